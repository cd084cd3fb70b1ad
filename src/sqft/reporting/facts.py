"""The sentences, tables and samples of a report as plain data, for its page, its Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqft.measuring.size import human, of_half
from sqft.reporting.collect import Section, StageFolder
from sqft.reporting.tables import Column, Table, count, duration, millions, percent, points, share

Row = Mapping[str, Any]
ACCURACY = Column("accuracy (95 % interval)", "accuracy", percent)
SIZE = Column("size to serve", "size", human)
STAGES = (
    Column("stage", "title"), ACCURACY, Column("perplexity (95 %)", "perplexity", "{:.2f}".format),
    Column("sparsity", "sparsity", share), Column("zeros kept", "zeros_kept", share), SIZE,
    Column("of dense float16", "of_half", "{:.2f}x".format), Column("took", "seconds", duration),
)  # fmt: skip
ZEROS = (
    Column("stage", "title"), Column("pruned weights", "pruned", count), Column("no longer zero", "filled", count),
    Column("kept", "zeros_kept", share),
    Column("integers compared", "integers_compared", lambda n: f"{count(n)}, all equal"),
    Column("largest logit difference", "max_logit_difference", "{:.2g}".format),
)  # fmt: skip
WRITTEN = (
    Column("stage", "name"), Column("seed", "seed"), Column("key", "key", lambda key: str(key)[:12]),
    Column("written (UTC)", "created", lambda time: str(time).replace("T", " ")[:16]),
)  # fmt: skip
TILES = {  # columns whose numbers of the best model stand on top of the page, and what is said of them
    "accuracy": "", "perplexity": "", "difference_ci95": "paired", "sparsity": "of the linear weights",
    "sparsity_kept": "of the linear weights", "zeros_kept": "of the pruned weights", "size": "of its weights",
    "max_logit_difference": "merged against un-merged", "decode_tokens_per_second": "one after another",
}  # fmt: skip


def stage_rows(section: Section) -> list[Row]:
    """A row a stage; one that was scored by several tasks has a row for each. ``mergeable``: whether it is one model of
    base and adapter; absent of what was not adapted."""
    rows = []
    parameters = next((s.numbers["parameters"] for s in section.stages if s.numbers.get("parameters")), None)
    for stage in section.stages:
        bits = stage.numbers.get("bits")
        first, *others = [task for task in stage.scores if task] or [""]
        for task in (first, *others):
            scores = {**(stage.scores.get("", {}) if task == first else {}), **stage.scores.get(task, {})}
            rows.append({**stage.numbers, **scores, "title": stage.name + (f", {task}" if others else ""),
                         "mergeable": stage.is_adapted or (False if stage.is_adapter else None),
                         "task": task, "stage": stage, "size": (size := section.serving_bytes(stage)),
                         "of_half": of_half(size, parameters),
                         "precision": f"INT{bits:.0f}" if bits else "float",
                         "predictions": stage.predictions if task == first else []})  # fmt: skip
    return rows


def final_stage(section: Section) -> StageFolder | None:
    """What a run is about: the last merged or fully trained model, else the last stage; scored ones first."""
    stages = [stage for stage in section.stages if stage.kind != "model"]
    return max(reversed(stages), key=lambda stage: (bool(stage.scores), stage.is_adapted), default=None)


def stage_table(section: Section) -> Table:
    rows, final = stage_rows(section), final_stage(section)
    return Table(STAGES, rows, next((row for row in rows if row["stage"] is final), None))


def best_and_reference(section: Section) -> tuple[Row | None, Row | None]:
    """What a section is about, and what that is compared with: of a comparison the most accurate method that merges,
    and LoRA at its sparsity; of a run its final stage, and the model before adapting."""
    if section.methods:
        rated = [method for method in section.methods if "accuracy" in method]
        best = max((m for m in rated if m["mergeable"]), key=lambda m: m["accuracy"], default=None)
        name = section.comparison.get("reference") or "lora"
        named = [m for m in rated if m.get("name") == name and m is not best]
        same = [m for m in named if best is None or m.get("sparsity") == best.get("sparsity")]
        return best, next(iter(same or named), None)
    table = stage_table(section)
    if (best := table.strong) is None:
        return None, None
    before = [stage for stage in section.lineage(best["stage"])[1:] if not stage.is_adapter]
    earlier = [row for stage in before for row in table.rows if row["stage"] is stage and row["task"] == best["task"]]
    return best, next((row for row in earlier if "accuracy" in row), None)


def method_table(section: Section, folders: bool = False) -> Table:
    """The rows of a comparison: the paper's columns, and what serving costs; with the ``folders`` of the models."""
    best, reference = best_and_reference(section)
    columns = [
        Column("method", "method"), Column("sparsity", "sparsity", lambda v: f"{v * 100:g} %"),
        Column("one model", "mergeable", lambda v: "yes" if v else "no"), Column("precision", "precision"), ACCURACY,
        Column(f"points to {(reference or {}).get('method', 'LoRA')} (95 %)", "difference_ci95", points),
        Column("sparsity kept", "sparsity_kept", share), SIZE, Column("trainable", "trainable_parameters", millions),
        Column("training", "train_seconds", lambda s: f"{s / 60:.1f} min"),
        Column("peak memory", "train_peak_bytes", human),
        Column("tokens / s", "decode_tokens_per_second", "{:.1f}".format),
    ]  # fmt: skip
    return Table(columns + [Column("folder", "folder")] * folders, section.methods, best)


def result_table(section: Section) -> Table:
    return method_table(section) if section.methods else stage_table(section)


def zeros_table(section: Section) -> Table:
    """Of the stages that counted."""
    return Table(ZEROS, [{**stage.numbers, "title": stage.name} for stage in section.stages
                         if {"pruned", "filled"} <= stage.numbers.keys()])  # fmt: skip


def written_table(section: Section) -> Table:
    return Table(WRITTEN, [{**vars(stage.manifest), "name": stage.name} for stage in section.written])


def versions(section: Section) -> str:
    """Of the packages that wrote the stages; several of one package if they differ."""
    known = [stage.manifest.versions for stage in section.written if isinstance(stage.manifest.versions, dict)]
    return ", ".join(dict.fromkeys(f"{package} {version}" for one in known for package, version in one.items()))


def verdict(section: Section) -> str:
    """One line; what matters is between double asterisks."""
    best, reference = best_and_reference(section)
    if best is None:
        return f"{len(result_table(section).rows)} models: none that is adapted, merged into one and scored yet."
    score = "not evaluated yet" if "perplexity" not in best else f"perplexity **{best['perplexity']:.2f}**"
    score = f"**{percent(best['accuracy'])}** on {best['task']}" if "accuracy" in best else score
    sparsity = best.get("sparsity_kept", best.get("sparsity"))
    what = ["one", f"{percent(sparsity)} sparse" if sparsity else "", best.get("precision", ""), "model"]
    what = ["an adapter and its base"] if best["mergeable"] is False else what
    text = f"**{best['title']}**: {score}, {' '.join(filter(None, what))}"
    text += f" of {human(best['size'])}" if best.get("size") else ""
    text += " in which **every pruned weight is still exactly zero**" if best.get("zeros_kept") == 1 else ""
    text += f"; {reference['title']} has {percent(reference['accuracy'])}" if reference else ""
    text += f" (paired difference {points(best['difference_ci95'])} points, 95 %)" if "difference_ci95" in best else ""
    return text + "."


def tiles(section: Section) -> list[tuple[str, str, str]]:
    """(label, value, detail) of what matters of the model that the section is about."""
    table = result_table(section)
    row, found = table.strong or {}, []
    for column in (*table.columns, *ZEROS[-1:]):
        if column.key in TILES and row.get(column.key) is not None:
            value, _, interval = column.cell(row).partition(" (")
            found.append((column.title.partition(" (")[0], value, interval.rstrip(")") or TILES[column.key]))
    return found


def samples(section: Section, limit: int = 6) -> list[tuple[str, str, list[tuple[str, str, bool | None]]]]:
    """(problem, answer, what each model answered: its name, text, whether it is right or None) of problems that all
    models with predictions (at most ten) answered: the first of each pattern of right and wrong, the most frequent
    pattern first, then more of the same until there are ``limit``."""
    models = {row["title"]: {str(record["prompt"]): record for record in row["predictions"] if "prompt" in record}
              for row in [row for row in result_table(section).rows if row["predictions"]][:10]}  # fmt: skip
    patterns: dict[tuple[bool | None, ...], list[Any]] = {}
    for prompt in next(iter(models.values()), {}):
        if all(prompt in answers for answers in models.values()):
            records = {name: answers[prompt] for name, answers in models.items()}
            answers = [(name, str(record.get("generated", "")), right if isinstance(right, bool) else None)
                       for name, record in records.items() for right in [record.get("correct")]]  # fmt: skip
            wanted = str(next(iter(records.values())).get("answer", ""))
            patterns.setdefault(tuple(right for *_, right in answers), []).append((prompt, wanted, answers))
    ordered = sorted(patterns.values(), key=len, reverse=True)
    return [found[i] for i in range(limit) for found in ordered if i < len(found)][:limit]
