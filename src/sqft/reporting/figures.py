"""A section's pictures: pipeline, score over size, training, search, sparsity by layer, weights before and after."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sqft.drawing import Chart, Series
from sqft.errors import SqftError
from sqft.measuring.size import human
from sqft.measuring.weights import WeightFolder, histograms
from sqft.reporting.collect import Section, StageFolder, numbers
from sqft.reporting.facts import final_stage, result_table
from sqft.reporting.tables import millions, percent, share
from sqft.searching.choose import read_points
from sqft.searching.plots import plots

SHOWN = 4  # searches and heat maps of a section; runs of a comparison are alike
CARDS = {  # of a stage: the number on its card, how it is written, and what is said of it, to which an option belongs
    "sparsify": ("sparsity", percent, "pruned by", "method"), "quantize": ("bits", "INT{:.0f}".format, "by", "method"),
    "train": ("trainable_parameters", millions, "trained,", "adapter"), "search": ("parameters", millions, "kept", ""),
    "extract": ("parameters", millions, "kept", ""), "merge": ("zeros_kept", share, "of zeros kept", ""),
}  # fmt: skip
MERGED = {True: (0, "merged into one model"), False: (1, "base and adapter"), None: (7, "not adapted")}  # colours


class Figure(NamedTuple):
    """A chart, or a heat map of ``rows`` (values by module and layer, which ``text`` writes; the ``darkest`` one).
    ``full``: as wide as the page, on phones drawn anew."""

    title: str
    chart: Chart | None = None
    note: str = ""
    full: bool = False
    rows: Mapping[str, Mapping[int, float]] | None = None
    text: Callable[[float], str] = str
    darkest: float = 1.0


def pipeline(section: Section) -> list[tuple[str, list[dict[str, str]]]]:
    """The stages as chains: (what the first was made from, if that is in another chain, cards). A chain ends where
    several stages were made from one."""
    chains, sources, before = [], [stage.source for stage in section.stages], ""
    for stage in section.stages:
        if not before or stage.source != before or sources.count(before) > 1:
            chains.append((source.name if (source := section.stage(stage.source)) else "", []))
        chains[-1][1].append(_card(section, stage))
        before = stage.key
    return chains


def _card(section: Section, stage: StageFolder) -> dict[str, str]:
    key, text, detail, option = CARDS.get(stage.kind, ("", str, stage.kind, ""))
    size = section.serving_bytes(stage)
    value = text(stage.numbers[key]) if key in stage.numbers else human(size) if size else "-"
    accuracy = next((percent(s["accuracy"]) for s in stage.scores.values() if "accuracy" in s), "")
    detail = "the start" if stage.kind == "model" else f"{detail} {stage.config.get(option, '')}"
    kind = "merge" if stage.is_adapted else stage.kind
    return {"kind": kind, "name": stage.name, "value": value, "detail": detail, "accuracy": accuracy}


def score_over_size(sections: Sequence[Section]) -> list[Figure]:
    """A figure for each metric. Of one section, merged models have a colour of their own; of several, each section."""
    found: dict[str, tuple[list[Series], list[Series]]] = {}
    for i, section in enumerate(sections):
        for row in result_table(section).rows:
            colour, key = (i, section.title) if len(sections) > 1 else MERGED[row["mergeable"]]
            shape = "square" if row["mergeable"] else "dot"
            for kind, scale, metric in (
                ("accuracy", 100, f"accuracy on {row['task']}, %"),
                ("perplexity", 1, "perplexity"),
            ):
                if not row.get("size") or kind not in row:
                    continue
                size, score = row["size"] / 1e6, row[kind] * scale
                ends = [(size, end * scale) for end in row.get(f"{kind}_ci95", [row[kind]] * 2)]
                tip = f"{row['title']}: {score:.4g}, {human(row['size'])}"
                intervals, marks = found.setdefault(metric, ([], []))
                intervals.append(Series(ends, colour, "whisker"))
                marks.append(Series([(size, score)], colour, shape, tip, row["title"], key))
    return [Figure("", Chart(f"{metric} over size", "size to serve, MB", metric, intervals + marks),
                   f"{'Up' if '%' in metric else 'Down'} and to the left is better. Bars are 95 % intervals.", True)
            for metric, (intervals, marks) in found.items() if len(marks) > 1]  # fmt: skip


def training(section: Section) -> list[Figure]:
    """Loss over steps, all trainings in one chart, held-out loss dashed."""
    series = []
    for i, stage in enumerate(stage for stage in section.stages if stage.kind == "train"):
        log = list(map(numbers, section.read_lines(stage.folder / "training_log.jsonl")))
        for name, kind in (("loss", "line"), ("eval_loss", "dashed")):
            if points := [(entry["step"], entry[name]) for entry in log if {"step", name} <= entry.keys()]:
                series.append(Series(points, i, kind, f"{stage.name}, {name}", key=stage.name))
    chart = Chart("loss over training steps", "step", "loss", series)
    return [Figure("", chart, "Dashed, or a single dot: held-out loss.", True)] if series else []


def search(section: Section) -> list[Figure]:
    """How each search went, score over cost, and the ranks that it chose."""
    figures: list[Figure] = []
    for stage in [stage for stage in section.stages if stage.kind == "search"][:SHOWN]:
        try:
            trials = [t for t in read_points(stage.folder) if {"number", "score", "cost"} <= numbers(vars(t)).keys()]
        except SqftError as error:
            section.note(str(error))
            continue
        charts = plots(trials, stage.metrics.get("trial"), *map(stage.config.get, ("metric", "cost"))).values()
        figures += [Figure(f"{stage.name}: {chart.summary}", chart) for chart in charts if len(trials) > 1]
        figures += heat_map(f"{stage.name}: chosen ranks", numbers(stage.metrics.get("ranks")), "{:.3g}".format)
    return figures


def sparsity(section: Section) -> list[Figure]:
    """Heat maps of the share of zeros, as each pruning stage wrote it down."""
    found = [(f"{stage.name}: pruned", numbers(stage.metrics.get("by_module"))) for stage in section.stages]
    return [figure for title, values in found for figure in heat_map(title, values, share)][:SHOWN]


def heat_map(title: str, values: Mapping[str, float], text: Callable[[float], str]) -> list[Figure]:
    """Of names like 'model.layers.3.mlp.up_proj' or '3.up_proj'; others are left out. None if nothing is left."""
    rows: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        if found := re.search(r"(?:^|\.)(\d+)(?:$|\.(.+))", name):
            rows.setdefault(found[2] or "all", {})[int(found[1])] = value
    note = f"{text(min(values.values()))} to {text(max(values.values()))}; at the right, a row's mean." if rows else ""
    return [Figure(title, None, note, True, rows, text, max(1.0, *values.values()))] if rows else []


def weights(section: Section) -> list[Figure]:
    """Histograms before and after, of the model that the section is about: of its packed folders, of its float ones."""
    stages = section.lineage(end)[::-1] if (end := final_stage(section)) else []
    try:
        found = [(s.name, WeightFolder(s.folder)) for s in stages if any(s.folder.glob("model*.safetensors"))]
        groups = ([pair for pair in found if bool(pair[1].bits) is packed] for packed in (True, False))
        return [before_and_after(dict(group)) for group in groups if group]
    except SqftError as error:
        section.note(f"no histogram: {error}")
        return []


def before_and_after(folders: Mapping[str, WeightFolder]) -> Figure:
    """Outlines over one another. What is pruned would dwarf the rest: it is a pale bar at 0 that is cut off."""
    first, found = next(iter(folders.values())), histograms(list(folders.values()))
    top = 1.3 * max(height for one in found for _, height in one.outline)
    series, notes = [], [f"{found[0].matrices} of {len(first.sizes)} weight matrices"]
    for colour, (name, one) in enumerate(zip(folders, found, strict=True), 7):  # the first one is grey
        series.append(Series(one.outline, colour, "area", name, key=name))
        if one.pruned:
            side, tip = one.width / 2, f"{name}: {one.pruned:.2f} % pruned (pale, cut off)"
            series.append(Series([(-side, 0), (-side, top), (side, top), (side, 0)], colour, "pale", tip))
            notes.append(tip)
    title = (f"INT{first.bits} grid: " if first.bits else "Float: ") + " to ".join(folders)
    axis = "integer level, from the zero point" if first.bits else "weight"
    return Figure(title, Chart(f"histogram of weights, {title}", axis, "% of the weights", series), "; ".join(notes))
