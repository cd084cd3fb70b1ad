"""The sentences and tables of a report, as plain text, for its page and its Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqft.measuring.size import human
from sqft.reporting.collect import Section, Stage, interval, number, serving_bytes
from sqft.reporting.table import HEADER, Row, cells, share

ZEROS_HEADER = ("stage", "pruned weights", "no longer zero", "kept", "integers compared", "largest logit difference")
DASH = "-"


@dataclass(frozen=True)
class Point:
    """One model of the chart of score over size. ``merged``: whether it is one model; None if that is unknown."""

    name: str
    size: float
    score: float
    interval: tuple[float, float] | None
    metric: str
    merged: bool | None = None


@dataclass(frozen=True)
class Tile:
    """One number that matters."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Sample:
    """One problem and what each model answered: (model, text, whether it is right or None)."""

    prompt: str
    answer: str
    answers: Sequence[tuple[str, str, bool | None]]


def accuracy(value: float | None) -> str:
    return DASH if value is None else f"{value * 100:.1f} %"


def between(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0] * 100:.1f} - {pair[1] * 100:.1f} %"


def points_between(pair: tuple[float, float] | None) -> str:
    return DASH if pair is None else f"{pair[0] * 100:+.1f} to {pair[1] * 100:+.1f} points"


def precision(stage: Stage) -> str:
    bits = number(stage.metrics, "bits")
    return f"INT{bits:.0f}" if bits else "float"


def label(stage: Stage) -> str:
    """How a chart names a stage; of several with one kind, tables have the whole path."""
    return f"{stage.name} (start)" if stage.kind == "model" else stage.name


def stage_rows(section: Section) -> list[tuple[str, ...]]:
    """Cells under ``table.HEADER``; a stage that was scored by several tasks has a row for each."""
    rows = []
    for stage in section.stages:
        tasks = [task for task in stage.scores if task] or [""]
        for task in tasks:
            known = {name: value for name, value in stage.scores.get(task, {}).items() if value is not None}
            scores = {**stage.scores.get("", {}), **known}  # the perplexity may come from an evaluation without a task
            name = label(stage) + (f", {task}" if len(tasks) > 1 else "")
            first, _, *rest = cells(_row(section, stage, name, scores))
            rows.append((first, _accuracy_cell(scores), *rest))
    return rows


def _accuracy_cell(scores: dict[str, Any]) -> str:
    found = interval(scores, "accuracy_ci95")
    return accuracy(number(scores, "accuracy")) + (f" ({between(found)})" if found else "")


def _row(section: Section, stage: Stage, name: str, scores: dict[str, Any]) -> Row:
    parameters, zeros = (number(stage.metrics, key) for key in ("parameters", "zeros"))
    return Row(
        name, number(scores, "accuracy"), interval(scores, "accuracy_ci95"), number(scores, "perplexity"),
        interval(scores, "perplexity_ci95"), number(stage.metrics, "sparsity"), number(stage.metrics, "zeros_kept"),
        int(parameters - zeros) if parameters is not None and zeros is not None else None,
        serving_bytes(stage, section), number(stage.metrics, "seconds"),
    )  # fmt: skip


def stage_header() -> tuple[str, ...]:
    return tuple("size to serve" if name == "on disk" else name for name in HEADER)


def method_header(section: Section) -> tuple[str, ...]:
    reference = next((str(m.get("method")) for m in section.methods if m.get("name") == _reference(section)), "LoRA")
    return (
        "method", "sparsity", "one model", "precision", "accuracy (95 % interval)", f"points to {reference} (95 %)",
        "sparsity kept", "size to serve", "trainable", "training", "peak memory", "tokens / s",
    )  # fmt: skip


def _reference(section: Section) -> str:
    """The name of the method that the others' accuracies are compared with."""
    return str(section.comparison.get("reference") or "lora")


def method_rows(section: Section) -> list[tuple[str, ...]]:
    """Cells under ``method_header``."""
    rows = []
    for method in section.methods:
        merged = mergeable(method)
        trainable, seconds = number(method, "trainable_parameters"), number(method, "train_seconds")
        target = number(method, "sparsity")
        peak, speed = number(method, "train_peak_bytes"), number(method, "decode_tokens_per_second")
        size, difference = number(method, "size"), points_between(interval(method, "difference_ci95"))
        rows.append((
            str(method.get("method") or "?"), DASH if target is None else f"{target * 100:g} %",
            DASH if merged is None else "yes" if merged else "no",
            str(method.get("precision") or DASH),
            _accuracy_cell(method),
            difference.removesuffix(" points"),
            share(number(method, "sparsity_kept")), DASH if size is None else human(size),
            DASH if trainable is None else f"{trainable / 1e6:.2f} M", DASH if seconds is None else f"{seconds:.0f} s",
            DASH if peak is None else human(peak), DASH if speed is None else f"{speed:.1f}",
        ))  # fmt: skip
    return rows


def mergeable(method: dict[str, Any]) -> bool | None:
    """Whether a method gives one model; None for a model that was not adapted, or if it is not said."""
    value = method.get("mergeable")
    return value if isinstance(value, bool) else None


def method_name(section: Section, method: dict[str, Any]) -> str:
    """A method's title, with its sparsity where the comparison has several."""
    title, target = str(method.get("method") or "?"), number(method, "sparsity")
    several = len({number(other, "sparsity") for other in section.methods} - {None}) > 1
    return f"{title}, {target * 100:g} %" if several and target is not None else title


def chart_points(section: Section) -> list[Point]:
    """Models with a size and a score. Where none has an accuracy, the score is the perplexity."""
    if section.methods:
        task = str(section.comparison.get("task") or "the task")
        metric = f"accuracy on {task}"
        return [Point(method_name(section, m), size, score, interval(m, "accuracy_ci95"), metric, mergeable(m))
                for m in section.methods
                if (size := number(m, "size")) and (score := number(m, "accuracy")) is not None]  # fmt: skip
    found = []
    for stage in section.stages:
        size = serving_bytes(stage, section)
        if size is None:
            continue
        merged = True if stage.kind == "merge" else None
        for task, scores in stage.scores.items():
            for name, what in (("accuracy", f"accuracy on {task}"), ("perplexity", "perplexity")):
                value = number(scores, name)
                if value is not None:
                    found.append(Point(label(stage), size, value, interval(scores, f"{name}_ci95"), what, merged))
    return found


def final_stage(section: Section) -> Stage | None:
    """What the section is about: the last merged model, else the last stage; scored ones first."""
    stages = [stage for stage in section.stages if stage.manifest is not None]
    ranked = sorted(stages, key=lambda s: (bool(s.scores), s.kind == "merge"))  # stable: the last of the best
    return ranked[-1] if ranked else None


def verdict(section: Section) -> str:
    """One line; what matters is between double asterisks."""
    if section.methods:
        return _compare_verdict(section)
    final = final_stage(section)
    if final is None:
        return f"{len(section.evaluations)} evaluations of models that are in no folder."
    what = _what(section, final)
    models = [s for s in section.lineage(final)[1:] if s.kind in ("quantize", "sparsify", "model")]
    before = next((s for s in models if s.scores), None)
    for task, scores in final.scores.items():
        value = number(scores, "accuracy")
        if value is not None:
            earlier = number(before.scores.get(task), "accuracy") if before else None
            since = "" if earlier is None else f", from {accuracy(earlier)} before adapting"
            return f"**{accuracy(value)}** on {task}{since}: {what}."
    value = number(final.scores.get(""), "perplexity")
    if value is not None:
        return f"Perplexity **{value:.2f}**: {what}."
    return f"Not evaluated yet: {what}."


def _what(section: Section, final: Stage) -> str:
    """'one 50 % sparse INT4 model of 171 MB in which ...'"""
    sparsity, size = number(final.metrics, "sparsity"), serving_bytes(final, section)
    words = ["an adapter and its base" if final.kind in ("train", "search", "extract") else "one"]
    if words == ["one"]:
        words += [f"{sparsity * 100:.1f} % sparse"] if sparsity else []
        words += [precision(final), "model"]
    words += [f"of {human(size)}"] if size else []
    if final.kind == "merge" and number(final.metrics, "zeros_kept") == 1:
        words.append("in which **every pruned weight is still exactly zero**")
    return " ".join(words)


def _compare_verdict(section: Section) -> str:
    best, lora = best_methods(section)
    if best is None:
        return f"{len(section.methods)} methods; none that merges into one model has been scored yet."
    size = number(best, "size")
    score = accuracy(number(best, "accuracy"))
    text = (f"**{method_name(section, best)}** is the best that merges into one model: **{score}**"
            + (f" in {human(size)}" if size else ""))  # fmt: skip
    if lora is not None:
        size = number(lora, "size")
        beside = "" if mergeable(lora) else ", whose adapter stays beside its base,"
        text += (f"; {method_name(section, lora)}{beside} has {accuracy(number(lora, 'accuracy'))}"
                 + (f" in {human(size)}" if size else ""))  # fmt: skip
        difference = interval(best, "difference_ci95")
        if difference:
            text += f" (paired difference {points_between(difference)}, 95 %)"
    return text + "."


def best_methods(section: Section) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The most accurate method that merges, and the reference at its sparsity (LoRA)."""
    scored = [m for m in section.methods if number(m, "accuracy") is not None]
    merging = [m for m in scored if mergeable(m)]
    best = max(merging, key=lambda m: number(m, "accuracy") or 0, default=None)
    target = number(best, "sparsity")
    same = [m for m in scored if target is None or number(m, "sparsity") in (target, None)]
    found = next((m for m in same if m.get("name") == _reference(section)), None)
    return best, None if found is best else found


def tiles(section: Section) -> list[Tile]:
    """A few numbers for the top of a section."""
    if section.methods:
        return _compare_tiles(section)
    final = final_stage(section)
    if final is None:
        return []
    found = []
    for task, scores in list(final.scores.items())[:2]:
        if (value := number(scores, "accuracy")) is not None:
            found.append(Tile(f"accuracy, {task}", accuracy(value), between(interval(scores, "accuracy_ci95"))))
        if (value := number(scores, "perplexity")) is not None:
            found.append(Tile("perplexity", f"{value:.2f}"))
    metrics = final.metrics
    if (value := number(metrics, "sparsity")) is not None:
        found.append(Tile("sparsity", share(value), "of the linear weights"))
    if (value := number(metrics, "zeros_kept")) is not None:
        pruned = number(metrics, "pruned")
        found.append(Tile("zeros kept", share(value), "" if pruned is None else f"of {pruned:,.0f}".replace(",", " ")))
    if (value := serving_bytes(final, section)) is not None:
        kind = precision(final) if final.kind in ("quantize", "merge") else ""
        found.append(Tile("size to serve", human(value), kind))
    if (value := number(metrics, "max_logit_difference")) is not None:
        found.append(Tile("logit difference", f"{value:.2g}", "merged against un-merged"))
    return found


def _compare_tiles(section: Section) -> list[Tile]:
    best, lora = best_methods(section)
    found = [Tile("methods", str(len(section.methods)), str(section.comparison.get("task") or ""))]
    for title, method in (("best merged", best), ("reference", lora)):
        if method is not None:
            found.append(Tile(title, accuracy(number(method, "accuracy")), method_name(section, method)))
    if best is not None:
        difference, kept, size = interval(best, "difference_ci95"), number(best, "sparsity_kept"), number(best, "size")
        if difference:
            found.append(Tile("difference, 95 %", points_between(difference).removesuffix(" points"), "points, paired"))
        found.append(Tile("sparsity kept", share(kept), method_name(section, best)))
        found.append(Tile("size to serve", DASH if size is None else human(size), str(best.get("precision") or "")))
    return found


def zero_rows(section: Section) -> list[tuple[str, ...]]:
    """Cells under ``ZEROS_HEADER``, of the stages that counted."""
    rows = []
    for stage in section.stages:
        pruned, filled = number(stage.metrics, "pruned"), number(stage.metrics, "filled")
        if pruned is None or filled is None:
            continue
        compared, difference = number(stage.metrics, "integers_compared"), number(stage.metrics, "max_logit_difference")
        rows.append((stage.name, _count(pruned), _count(filled), share(number(stage.metrics, "zeros_kept")),
                     DASH if compared is None else f"{_count(compared)}, all equal",
                     DASH if difference is None else f"{difference:.2g}"))  # fmt: skip
    return rows


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def environment_rows(section: Section) -> list[tuple[str, str]]:
    """(package, version), with the stages of each version where they differ."""
    stages = [stage for stage in section.stages + section.evaluations if stage.manifest is not None]
    names = dict.fromkeys(name for stage in stages for name in _versions(stage))
    rows = []
    for name in names:
        found: dict[str, list[str]] = {}
        for stage in stages:
            if name in _versions(stage):
                found.setdefault(str(_versions(stage)[name]), []).append(stage.name)
        several = len(found) > 1
        rows.append((name, "; ".join(f"{v} ({', '.join(who)})" if several else v for v, who in found.items())))
    return rows


def _versions(stage: Stage) -> dict[str, Any]:
    versions = stage.manifest.versions if stage.manifest else {}
    return versions if isinstance(versions, dict) else {}


def seed_rows(section: Section) -> list[tuple[str, ...]]:
    """(stage, seed, when it was written, first characters of its key)."""
    return [(stage.name, DASH if stage.manifest.seed is None else str(stage.manifest.seed),
             str(stage.manifest.created).replace("T", " ")[:16] or DASH, str(stage.manifest.key)[:12] or DASH)
            for stage in section.stages + section.evaluations if stage.manifest is not None]  # fmt: skip


def samples(section: Section, limit: int = 6) -> list[Sample]:
    """Problems that all models with predictions answered: the first of each pattern of right and wrong, the most
    frequent pattern first, then more of the same until there are ``limit``."""
    models = dict(_predictions(section))
    shared = [record["prompt"] for record in next(iter(models.values()), {}).values()]
    shared = [prompt for prompt in shared if all(prompt in answers for answers in models.values())]
    patterns: dict[tuple[Any, ...], list[str]] = {}
    for prompt in shared:
        pattern = tuple(answers[prompt].get("correct") for answers in models.values())
        patterns.setdefault(pattern, []).append(prompt)
    ordered = sorted(patterns.values(), key=lambda prompts: -len(prompts))
    rounds = [prompts[i] for i in range(limit) for prompts in ordered if i < len(prompts)]
    return [_sample(prompt, models) for prompt in rounds[:limit]]


def _sample(prompt: str, models: dict[str, dict[str, dict[str, Any]]]) -> Sample:
    first = next(iter(models.values()))[prompt]
    answers = []
    for name, found in models.items():
        correct = found[prompt].get("correct")
        answers.append((name, str(found[prompt].get("generated", "")), correct if isinstance(correct, bool) else None))
    return Sample(prompt, str(first.get("answer", "")), answers)


def _predictions(section: Section) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """(name of the model, its predictions by prompt), at most ten models."""
    named: list[tuple[str, Stage]] = []
    by_key = {evaluation.key: evaluation for evaluation in section.evaluations}
    for method in section.methods:
        evaluation = by_key.get(os.path.abspath(section.root / str(method.get("evaluation") or "")))
        if evaluation is not None:
            named.append((method_name(section, method), evaluation))
    named = named or [(label(stage), stage) for stage in section.stages]
    for name, stage in [(name, stage) for name, stage in named if stage.predictions][:10]:
        answers = {str(r["prompt"]): {**r, "prompt": str(r["prompt"])} for r in stage.predictions if "prompt" in r}
        yield name, answers
