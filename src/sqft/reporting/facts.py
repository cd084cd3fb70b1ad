"""The sentences, tables and samples of a report as plain data, for its page, its Markdown and the terminal."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from sqft.measuring.size import human
from sqft.reporting.collect import Section, StageFolder, serving_bytes
from sqft.reporting.tables import Column, Table, count, duration, millions, percent, points, share

ACCURACY = Column("accuracy (95 % interval)", "accuracy", percent)
SIZE = Column("size to serve", "size", human)
STAGES = (
    Column("stage", "name"), ACCURACY, Column("perplexity (95 %)", "perplexity", "{:.2f}".format),
    Column("sparsity", "sparsity", share), Column("zeros kept", "zeros_kept", share), SIZE,
    Column("took", "seconds", duration),
)  # fmt: skip
ZEROS = (
    Column("stage", "name"), Column("pruned weights", "pruned", count), Column("no longer zero", "filled", count),
    Column("kept", "zeros_kept", share),
    Column("integers compared", "integers_compared", lambda n: f"{count(n)}, all equal"),
    Column("largest logit difference", "max_logit_difference", "{:.2g}".format),
)  # fmt: skip
WRITTEN = (Column("stage", "name"), Column("seed", "seed"), Column("written (UTC)", "created"), Column("key", "key"))
TILES = {  # columns whose numbers of the best model stand on top of the page, and what is said of them
    "accuracy": "", "perplexity": "", "difference_ci95": "paired", "sparsity": "of the linear weights",
    "sparsity_kept": "of the linear weights", "zeros_kept": "of the pruned weights", "size": "of its weights",
    "max_logit_difference": "merged against un-merged", "decode_tokens_per_second": "one after another",
}  # fmt: skip


class Sample(NamedTuple):
    """One problem and what each model answered: (model, text, whether it is right or None)."""

    prompt: str
    answer: str
    answers: list[tuple[str, str, bool | None]]


def precision(stage: StageFolder) -> str:
    bits = stage.numbers.get("bits")
    return f"INT{bits:.0f}" if bits else "float"


def label(stage: StageFolder) -> str:
    """How tables and charts name a stage."""
    return f"{stage.name} (start)" if stage.kind == "model" else stage.name


def stage_table(section: Section) -> Table:
    """A row a stage; one that was scored by several tasks has a row for each."""
    final, rows, strong = final_stage(section), [], None
    for stage in section.stages:
        strong = len(rows) if stage is final else strong
        tasks = [task for task in stage.scores if task] or [""]
        for task in tasks:  # the perplexity may come from an evaluation without a task
            scores = {**stage.scores.get("", {}), **stage.scores.get(task, {})}
            name = label(stage) + (f", {task}" if len(tasks) > 1 else "")
            rows.append({**stage.numbers, **scores, "name": name, "size": serving_bytes(stage, section)})
    return Table(STAGES, rows, strong)


def method_table(section: Section, folders: bool = False) -> Table:
    """The rows of a comparison: the paper's columns, and what serving costs; with the ``folders`` of the models."""
    best, reference = best_methods(section)
    columns = [
        Column("method", "method"), Column("sparsity", "sparsity", lambda v: f"{v * 100:g} %"),
        Column("one model", "mergeable", lambda v: "yes" if v else "no"), Column("precision", "precision"), ACCURACY,
        Column(f"points to {reference['method'] if reference else 'LoRA'} (95 %)", "difference_ci95", points),
        Column("sparsity kept", "sparsity_kept", share), SIZE, Column("trainable", "trainable_parameters", millions),
        Column("training", "train_seconds", lambda s: f"{s / 60:.1f} min"),
        Column("peak memory", "train_peak_bytes", human),
        Column("tokens / s", "decode_tokens_per_second", "{:.1f}".format),
    ]  # fmt: skip
    strong = next((i for i, method in enumerate(section.methods) if method is best), None)
    return Table(columns + [Column("folder", "folder")] * folders, section.methods, strong)


def zeros_table(section: Section) -> Table:
    """Of the stages that counted."""
    rows = [{**stage.numbers, "name": stage.name} for stage in section.stages]
    return Table(ZEROS, [row for row in rows if {"pruned", "filled"} <= row.keys()])


def written_table(section: Section) -> Table:
    rows = [{"name": stage.name, "seed": stage.manifest.seed, "key": str(stage.manifest.key)[:12] or None,
             "created": str(stage.manifest.created).replace("T", " ")[:16] or None}
            for stage in section.written]  # fmt: skip
    return Table(WRITTEN, rows)


def versions(section: Section) -> str:
    """Of the packages that wrote the stages; several of one package if they differ."""
    known = [stage.manifest.versions for stage in section.written if isinstance(stage.manifest.versions, dict)]
    return ", ".join(dict.fromkeys(f"{package} {version}" for one in known for package, version in one.items()))


def scored(section: Section) -> list[dict[str, Any]]:
    """Models with a size and a score: name, size, score, interval, metric, and whether it is one merged model."""
    if section.methods:
        task = section.comparison.get("task") or "the task"
        found = [(m, m["title"], m.get("size"), task, m.get("mergeable")) for m in section.methods]
    else:
        found = [(scores, label(stage), serving_bytes(stage, section), task, True if stage.kind == "merge" else None)
                 for stage in section.stages for task, scores in stage.scores.items()]  # fmt: skip
    return [{"name": name, "size": size, "score": scores[kind], "interval": scores.get(f"{kind}_ci95"),
             "metric": f"accuracy on {task}" if kind == "accuracy" else kind, "merged": merged}
            for scores, name, size, task, merged in found for kind in ("accuracy", "perplexity")
            if size and kind in scores]  # fmt: skip


def final_stage(section: Section) -> StageFolder | None:
    """What the section is about: the last merged model, else the last stage; scored ones first."""
    stages = [stage for stage in section.stages if stage.kind != "model"]
    return max(reversed(stages), key=lambda stage: (bool(stage.scores), stage.kind == "merge"), default=None)


def best_methods(section: Section) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The most accurate method that merges, and what the others are compared with, at its sparsity (LoRA)."""
    rated = [m for m in section.methods if "accuracy" in m]
    best = max((m for m in rated if m.get("mergeable")), key=lambda m: m["accuracy"], default=None)
    name = section.comparison.get("reference") or "lora"
    named = [m for m in rated if m.get("name") == name and m is not best]
    same = [m for m in named if best is None or m.get("sparsity") == best.get("sparsity")]
    return best, next(iter(same or named), None)


def verdict(section: Section) -> str:
    """One line; what matters is between double asterisks."""
    if section.methods:
        return _compare_verdict(section)
    final = final_stage(section)
    if final is None:
        return f"{len(section.evaluations)} evaluations of models that are in no folder."
    what = _what(section, final)
    models = [s for s in section.lineage(final)[1:] if s.kind in ("quantize", "sparsify", "model")]
    before = next((s.scores for s in models if s.scores), {})
    for task, scores in final.scores.items():
        if "accuracy" in scores:
            earlier = before.get(task, {}).get("accuracy")
            since = "" if earlier is None else f", from {percent(earlier)} before adapting"
            return f"**{percent(scores['accuracy'])}** on {task}{since}: {what}."
    if "perplexity" in final.scores.get("", {}):
        return f"Perplexity **{final.scores['']['perplexity']:.2f}**: {what}."
    return f"Not evaluated yet: {what}."


def _what(section: Section, final: StageFolder) -> str:
    """'one 50 % sparse INT4 model of 171 MB in which ...'"""
    sparsity, size = final.numbers.get("sparsity"), serving_bytes(final, section)
    words = f"one{f' {percent(sparsity)} sparse' if sparsity else ''} {precision(final)} model"
    words = "an adapter and its base" if final.kind in ("train", "search", "extract") else words
    words += f" of {human(size)}" if size else ""
    kept = final.kind == "merge" and final.numbers.get("zeros_kept") == 1
    return words + (" in which **every pruned weight is still exactly zero**" if kept else "")


def _compare_verdict(section: Section) -> str:
    best, reference = best_methods(section)
    if best is None:
        return f"{len(section.methods)} methods; none that merges into one model has been scored yet."

    def size(method: dict[str, Any]) -> str:
        return f" in {human(method['size'])}" if method.get("size") else ""

    text = (f"**{best['title']}** is the best that merges into one model: "
            f"**{percent(best['accuracy'])}**{size(best)}")  # fmt: skip
    if reference is not None:
        beside = "" if reference.get("mergeable") else ", whose adapter stays beside its base,"
        text += f"; {reference['title']}{beside} has {percent(reference['accuracy'])}{size(reference)}"
        if "difference_ci95" in best:
            text += f" (paired difference {points(best['difference_ci95'])} points, 95 %)"
    return text + "."


def tiles(section: Section) -> list[tuple[str, str, str]]:
    """(label, value, detail) of what matters of the model that the section is about."""
    table = method_table(section) if section.methods else stage_table(section)
    row = {} if table.strong is None else table.rows[table.strong]
    found = []
    for column in (*table.columns, *ZEROS[-1:]):
        if column.key in TILES and row.get(column.key) is not None:
            value, _, interval = column.cell(row).partition(" (")
            found.append((column.title.partition(" (")[0], value, interval.rstrip(")") or TILES[column.key]))
    return found


def samples(section: Section, limit: int = 6) -> list[Sample]:
    """Problems that all models with predictions answered: the first of each pattern of right and wrong, the most
    frequent pattern first, then more of the same until there are ``limit``."""
    models = _predictions(section)
    patterns: dict[tuple[Any, ...], list[Sample]] = {}
    for prompt in next(iter(models.values()), {}):
        if all(prompt in answers for answers in models.values()):
            records = {name: answers[prompt] for name, answers in models.items()}
            answers = [(name, str(record.get("generated", "")), right if isinstance(right, bool) else None)
                       for name, record in records.items() for right in [record.get("correct")]]  # fmt: skip
            sample = Sample(prompt, str(next(iter(records.values())).get("answer", "")), answers)
            patterns.setdefault(tuple(correct for *_, correct in answers), []).append(sample)
    ordered = sorted(patterns.values(), key=len, reverse=True)
    return [found[i] for i in range(limit) for found in ordered if i < len(found)][:limit]


def _predictions(section: Section) -> dict[str, dict[str, dict[str, Any]]]:
    """The predictions by prompt of at most ten models, by their names."""
    by_key = {evaluation.key: evaluation for evaluation in section.evaluations}
    paths = [(m["title"], os.path.abspath(section.root / m.get("evaluation", ""))) for m in section.methods]
    named = [(name, by_key[path]) for name, path in paths if path in by_key]
    named = [(name, stage) for name, stage in named or [(label(s), s) for s in section.stages] if stage.predictions]
    return {name: {str(record["prompt"]): record for record in stage.predictions if "prompt" in record}
            for name, stage in named[:10]}  # fmt: skip
