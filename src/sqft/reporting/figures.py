"""A section's pictures: pipeline, score over size, training, search, sparsity by layer, weights before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqft.drawing import COLOURS, Bars, Chart, Curve, Mark, histogram, make_axis, plain
from sqft.errors import SqftError
from sqft.measuring.size import human
from sqft.measuring.weights import BINS, WeightFolder, chosen, count_levels, count_values, spread
from sqft.reporting.collect import Section, StageFolder, numbers
from sqft.reporting.facts import final_stage, label, precision, scored
from sqft.reporting.tables import millions, percent, share
from sqft.searching.choose import read_points
from sqft.searching.plots import plots

CURVE_POINTS = 400  # of a training curve; more would not be seen
SHOWN = 4  # searches and heat maps of a section; runs of a comparison are alike
CARDS = {  # of a stage: the number on its card, how it is written, and what is said of it, to which an option belongs
    "sparsify": ("sparsity", percent, "pruned by", "method"), "quantize": ("bits", "INT{:.0f}".format, "by", "method"),
    "train": ("trainable_parameters", millions, "trained,", "adapter"), "search": ("parameters", millions, "kept", ""),
    "extract": ("parameters", millions, "kept", ""), "merge": ("zeros_kept", share, "of zeros kept", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A chart; or a heat map of modules (``rows``: name, cells, mean) over ``layers``, a cell being its tooltip and its
    shade, or None. ``full``: as wide as the page, on phones drawn anew."""

    title: str
    chart: Chart | None = None
    note: str = ""
    full: bool = False
    layers: Sequence[int] = ()
    rows: Sequence[tuple[str, list[tuple[str, float] | None], str]] = ()


def pipeline(section: Section) -> list[tuple[str, list[dict[str, str]]]]:
    """The stages as chains: (what the first was made from, if that is in another chain, cards). A chain ends where
    several stages were made from one."""
    sources = [stage.source for stage in section.stages]
    chains, before = [], ""
    for stage in section.stages if len(section.stages) > 1 else ():
        if not before or stage.source != before or sources.count(before) > 1:
            source = section.stage(stage.source)
            chains.append(("" if source is None else label(source), []))
        chains[-1][1].append(_card(section, stage))
        before = stage.key
    return chains


def _card(section: Section, stage: StageFolder) -> dict[str, str]:
    key, text, detail, option = CARDS.get(stage.kind, ("", str, stage.kind, ""))
    size = section.serving_bytes(stage)
    value = text(stage.numbers[key]) if key in stage.numbers else human(size) if size else "-"
    accuracy = next((percent(s["accuracy"]) for s in stage.scores.values() if "accuracy" in s), "")
    detail = "the start" if stage.kind == "model" else f"{detail} {stage.config.get(option, '')}"
    return {"kind": stage.kind, "name": stage.name, "value": value, "detail": detail, "accuracy": accuracy}


def score_over_size(sections: Sequence[Section]) -> list[Figure]:
    """A figure for each metric. Of one section, merged models have a colour of their own; of several, each section."""
    found: dict[str, list[dict[str, Any]]] = {}
    for i, section in enumerate(sections):
        for model in scored(section):
            found.setdefault(model["metric"], []).append({**model, "key": (i % COLOURS, section.title)})
    return [_score_figure(metric, models, len(sections) > 1) for metric, models in found.items() if len(models) > 1]


def _score_figure(metric: str, models: Sequence[dict[str, Any]], several: bool) -> Figure:
    accuracy = metric.startswith("accuracy")
    text: Callable[[float], str] = (lambda v: f"{v * 100:.4g} %") if accuracy else plain
    kinds = {True: (0, "merged into one model"), False: (1, "base and adapter"), None: (7, "not adapted")}
    keys = [m["key"] if several else kinds[m["merged"]] for m in models]
    marks = [Mark(m["name"], m["size"], m["score"], k, f"{m['name']}: {text(m['score'])}, {human(m['size'])}",
                  m["interval"], "square" if m["merged"] else "dot")
             for m, (k, _) in zip(models, keys, strict=True)]  # fmt: skip
    heights = [end for mark in marks for end in (*(mark.interval or ()), mark.y)]
    y = make_axis(metric, heights, text, limits=(0, 1 if accuracy else float("inf")))
    x = make_axis("size to serve", [mark.x for mark in marks], human, margin=0.12, limits=(0, float("inf")), count=8)
    legend = [(f"c{colour}", name) for colour, name in sorted(set(keys))]
    note = f"{metric.capitalize()}: {'up' if accuracy else 'down'} and to the left is better."
    note += " Bars are 95 % intervals." if any(mark.interval for mark in marks) else ""
    return Figure("", Chart(f"{metric} over size of {len(models)} models", x, y, marks=marks, keys=legend), note, True)


def training(section: Section) -> list[Figure]:
    """Loss over steps, all trainings in one chart, held-out loss dashed."""
    logs = [(stage.name, section.read_lines(stage.folder / "training_log.jsonl"))
            for stage in section.stages if stage.kind == "train"]  # fmt: skip
    drawn = [(name, loss, _curve(log, "eval_loss")) for name, log in logs if (loss := _curve(log, "loss"))]
    curves = [Curve(loss, i) for i, (_, loss, _) in enumerate(drawn[:COLOURS])]
    curves += [Curve(held_out, i, "dashed") for i, (*_, held_out) in enumerate(drawn[:COLOURS]) if held_out]
    if not curves:
        return []
    x = make_axis("step", [p[0] for c in curves for p in c.points], margin=0.02, limits=(0, float("inf")), whole=True)
    y = make_axis("loss", [p[1] for c in curves for p in c.points], zero=True)
    note = "Dashed, or a single dot: held-out loss." if len(curves) > len(drawn[:COLOURS]) else ""
    note += f" The first {COLOURS} of {len(drawn)} trainings." if len(drawn) > COLOURS else ""
    keys = [(f"c{i}", name) for i, (name, *_) in enumerate(drawn[:COLOURS])]
    return [Figure("", Chart("loss over training steps", x, y, curves, keys=keys), note, True)]


def _curve(log: Sequence[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have both, thinned, the last one kept."""
    points = [(found["step"], found[name]) for entry in log if {"step", name} <= (found := numbers(entry)).keys()]
    return points[:: -(-len(points) // CURVE_POINTS)][:-1] + points[-1:] if points else []


def search(section: Section) -> list[Figure]:
    """How each search went, score over cost, and the ranks that it chose."""
    stages = [stage for stage in section.stages if stage.kind == "search"]
    figures: list[Figure] = []
    for stage in stages[:SHOWN]:
        name = f" of {stage.name}" if len(stages) > 1 else ""
        try:
            trials = [t for t in read_points(stage.folder) if {"number", "score", "cost"} <= numbers(vars(t)).keys()]
        except SqftError as error:
            section.note(str(error))
            continue
        told = (stage.config.get("metric", ""), stage.config.get("cost", ""))
        drawn = plots(trials, stage.metrics.get("trial"), *told).values() if len(trials) > 1 else ()
        titles = (f"Search progress{name}", f"Score over cost{name}")
        figures += [Figure(title, chart) for title, chart in zip(titles, drawn, strict=False)]
        ranks = numbers(stage.metrics.get("ranks"))
        figures += heat_map(f"Chosen ranks{name}", ranks, max(ranks.values(), default=1.0), "{:.3g}".format)
    return figures


def sparsity(section: Section) -> list[Figure]:
    """Heat maps of the share of zeros, as each pruning stage wrote it down."""
    shares = [(stage.name, numbers(stage.metrics.get("by_module"))) for stage in section.stages]
    found = [heat_map(f"Pruned, after {name}", values, 1, lambda v: f"{v * 100:.2f} %") for name, values in shares]
    return [figure for figures in found for figure in figures][:SHOWN]


def heat_map(title: str, values: Mapping[str, float], high: float, text: Callable[[float], str]) -> list[Figure]:
    """Of names like 'model.layers.3.mlp.up_proj' or '3.up_proj'; others are left out. None if nothing is left."""
    rows: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if layer is not None:
            rows.setdefault(".".join(parts[layer + 1 :]) or "all", {})[int(parts[layer])] = value
    layers = sorted({layer for row in rows.values() for layer in row})

    def cell(module: str, layer: int) -> tuple[str, float] | None:
        if (value := rows[module].get(layer)) is None:
            return None
        return f"layer {layer}, {module}: {text(value)}", round(
            0.06 + 0.94 * min(1.0, max(0.0, value / (high or 1))), 3
        )

    shown = [(name, [cell(name, layer) for layer in layers], text(sum(row.values()) / len(row)))
             for name, row in rows.items()]  # fmt: skip
    note = f"{text(min(values.values()))} to {text(max(values.values()))}; at the right, a row's mean." if shown else ""
    return [Figure(title, None, note, True, layers, shown)] if shown else []


def weights(section: Section) -> list[Figure]:
    """Histograms before and after, of the model that the section is about: of its packed folders, of its float ones."""
    end = final_stage(section)
    groups: dict[bool, list[tuple[StageFolder, WeightFolder]]] = {}
    found = []
    for stage in section.lineage(end)[::-1] if end else ():
        if any(stage.folder.glob("model*.safetensors")):
            try:
                folder = WeightFolder(stage.folder)
                groups.setdefault(folder.packed, []).append((stage, folder))
            except SqftError as error:
                section.note(str(error))
    for _, group in sorted(groups.items(), reverse=True):
        try:
            found.append(_before_and_after(group))
        except (SqftError, OSError) as error:
            section.note(f"no histogram: {error}")
    return found


def _before_and_after(group: Sequence[tuple[StageFolder, WeightFolder]]) -> Figure:
    """A histogram of folders of one kind, all packed or all float, over the modules that all of them have."""
    (start, first), (end, last) = group[0], group[-1]
    sizes = {name: size for name, size in first.sizes.items() if all(name in folder.sizes for _, folder in group)}
    if not sizes:
        raise SqftError(f"{first.folder} has no linear weights that {last.folder} has as well")
    names = chosen(sizes)
    reach = 0.0 if first.packed else spread(first, names)
    bars, notes = [], []
    for i, (stage, folder) in enumerate(group):
        counts = count_levels(folder, names) if first.packed else count_values(folder, names, reach)
        shares = {value: number / counts.total for value, number in counts.kept.items()}
        bars.append(Bars(stage.name, shares, counts.pruned / counts.total, (7, 0, 2, 3)[i % 4]))
        notes += [f"{stage.name}: {counts.pruned / counts.total * 100:.2f} % pruned"] if counts.pruned else []
    notes.append(f"{len(names)} of {len(first.sizes)} weight matrices")
    kind, axis = (f"{precision(start)} grid", "integer level, from the zero point") if first.packed else (
        "Float", f"weight ({BINS} bins)")  # fmt: skip
    pruned = "The pale bar at 0, cut off, is what is pruned. " if any(one.pruned for one in bars) else ""
    title = f"{kind}: {start.name}" + (f" to {end.name}" if end is not start else "")
    chart = histogram(bars, axis, _signed, f"histogram of weights, {title}")
    return Figure(title, chart, pruned + "; ".join(notes) + ".")


def _signed(value: float) -> str:
    return f"{value:+.3g}" if abs(value) > 1e-9 else "0"
