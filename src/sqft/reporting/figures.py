"""A section's pictures: pipeline, score over size, training, search, sparsity by layer, weights before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqft.drawing import COLOURS, Bars, Chart, Curve, Mark, histogram, make_axis, plain
from sqft.errors import SqftError
from sqft.measuring.size import human
from sqft.measuring.weights import BINS, Histogram, WeightFolder, chosen, count_levels, count_values, moves, spread
from sqft.reporting.collect import Section, Stage, numbers, read_lines, serving_bytes
from sqft.reporting.facts import precision, scored
from sqft.reporting.tables import millions, percent
from sqft.searching.choose import read_points
from sqft.searching.plots import plots

CURVE_POINTS = 400  # of a training curve; more would not be seen
WITH_WEIGHTS = ("model", "sparsify", "quantize", "merge", "save")
SHOWN = 4  # searches and histograms of a section; runs of a comparison are alike


@dataclass(frozen=True)
class Figure:
    """A chart or a heat map with a title and a note. ``full``: as wide as the page, on phones drawn anew."""

    title: str
    chart: Chart | None = None
    note: str = ""
    full: bool = False
    heat: Heat | None = None


@dataclass(frozen=True)
class Heat:
    """A map of modules (rows: name, cells, mean) over layers; a cell is its tooltip and its shade, or None."""

    summary: str
    layers: list[int]
    rows: list[tuple[str, list[tuple[str, float] | None], str]]


@dataclass
class Branch:
    """Stages after one another, as cards of a number and what it is; then the branches that start from the last."""

    cards: list[dict[str, str]]
    below: list[Branch]

    @property
    def splits(self) -> bool:
        return len(self.below) > 1 or any(branch.splits for branch in self.below)


def pipeline(section: Section) -> Branch | None:
    """The stages as a tree; None if nothing was made from anything."""
    seen: set[str] = set()

    def grow(stages: list[Stage]) -> Branch:
        cards = []
        while len(stages) == 1:
            cards.append(_card(section, stages[0]))
            seen.add(stages[0].key)
            stages = [s for s in section.stages if s.source == stages[0].key and s.key not in seen]
        return Branch(cards, [grow([stage]) for stage in stages])

    known = {stage.key for stage in section.stages}
    roots = [stage for stage in section.stages if stage.source not in known]
    return grow(roots) if len(section.stages) > 1 and roots else None


def _card(section: Section, stage: Stage) -> dict[str, str]:
    told, size, method = stage.numbers, serving_bytes(stage, section), stage.config.get("method", "?")
    value, detail = human(size) if size else "-", "the start" if stage.kind == "model" else stage.kind
    if stage.kind == "sparsify" and "sparsity" in told:
        value, detail = percent(told["sparsity"]), f"pruned by {method}"
    elif stage.kind == "quantize":
        bits = told.get("bits_per_weight")
        value, detail = precision(stage), f"{bits:.2f} bits a weight" if bits else f"by {method}"
    elif stage.kind == "train" and "trainable_parameters" in told:
        value, detail = millions(told["trainable_parameters"]), f"trained, {stage.config.get('adapter', '?')}"
    elif stage.kind in ("search", "extract") and "parameters" in told:
        value, tried = millions(told["parameters"]), told.get("evaluated")
        detail = f"kept, {tried:.0f} tried" if tried else "kept"
    elif stage.kind == "merge" and "zeros_kept" in told:  # cut, not rounded: 99.99 % never reads 100 %
        detail = f"{int(told['zeros_kept'] * 1e4 + 1e-9) / 1e2:g} % of zeros kept"
    where, _, last = stage.name.rpartition("/") if stage.kind != "model" else ("", "", stage.name)
    score = next((percent(s["accuracy"]) for s in stage.scores.values() if "accuracy" in s), "")
    return {"kind": stage.kind, "where": where, "name": last, "value": value, "detail": detail, "accuracy": score}


def score_over_size(sections: Sequence[Section]) -> list[Figure]:
    """A figure for each metric. Of one section, merged models have a colour of their own; of several, each section."""
    found: dict[str, list[dict[str, Any]]] = {}
    for i, section in enumerate(sections):
        for model in scored(section):
            found.setdefault(model["metric"], []).append({**model, "key": (i % COLOURS, section.title)})
    return [_score_figure(metric, models, len(sections) > 1) for metric, models in found.items() if len(models) > 1]


def _score_figure(metric: str, models: Sequence[dict[str, Any]], several: bool) -> Figure:
    share = metric.startswith("accuracy")
    text: Callable[[float], str] = (lambda v: f"{v * 100:.4g} %") if share else plain
    merging = any(m["merged"] is not None for m in models)
    kinds = {True: (0, "merged into one model"), False: (1, "base and adapter"),
             None: (7 if merging else 0, "not adapted")}  # fmt: skip
    keys = [m["key"] if several else kinds[m["merged"]] for m in models]
    marks = [Mark(m["name"], m["size"], m["score"], k, f"{m['name']}: {text(m['score'])}, {human(m['size'])}",
                  m["interval"], "square" if m["merged"] else "dot")
             for m, (k, _) in zip(models, keys, strict=True)]  # fmt: skip
    limits = (0.0, float("inf"))
    heights = [end for mark in marks for end in (*(mark.interval or ()), mark.y)]
    y = make_axis(metric, heights, text, limits=(0, 1) if share else limits)
    x = make_axis("size to serve", [mark.x for mark in marks], _short_size, margin=0.12, limits=limits, count=8)
    legend = [(f"c{colour}", name) for colour, name in sorted(set(keys))] if merging or several else []
    note = f"{metric.capitalize()}: {'up' if share else 'down'} and to the left is better."
    note += " Bars are 95 % intervals." if any(mark.interval for mark in marks) else ""
    return Figure("", Chart(f"{metric} over size of {len(models)} models", x, y, marks=marks, keys=legend), note, True)


def _short_size(size: float) -> str:
    """'200 MB' where ``human`` writes '200.0 MB'."""
    value, unit = human(size).split()
    return f"{float(value):g} {unit}"


def training(section: Section) -> list[Figure]:
    """Loss over steps, all trainings in one chart; of a single training also the learning rate."""
    logs = [(stage.name, read_lines(section, stage.folder / "training_log.jsonl"))
            for stage in section.stages if stage.kind == "train"]  # fmt: skip
    logs = [(name, log) for name, log in logs if _curve(log, "loss")]
    several = len(logs) > 1
    curves, keys = [], []
    for i, (name, log) in enumerate(logs[:COLOURS]):
        curves.append(Curve(_curve(log, "loss"), i))
        keys.append((f"c{i}", name if several else "training loss"))
        if held_out := _curve(log, "eval_loss"):
            curves.append(Curve(held_out, i if several else 1, "dashed"))
            keys += [] if several else [("c1", "held-out loss")]
    if not curves:
        return []
    x = make_axis("step", [p[0] for c in curves for p in c.points], margin=0.02, limits=(0, float("inf")), whole=True)
    y = make_axis("", [p[1] for c in curves for p in c.points], zero=True)
    note = "Dashed, or a single dot: held-out loss." if several else ""
    note += f" The first {COLOURS} of {len(logs)} trainings." if len(logs) > COLOURS else ""
    loss = Figure("" if several else "Loss", Chart("loss over training steps", x, y, curves, keys=keys), note, several)
    rate = _curve(logs[0][1], "learning_rate")
    if several or len(rate) < 2:
        return [loss]
    y = make_axis("", [p[1] for p in rate], zero=True)
    return [loss, Figure("Learning rate", Chart("learning rate over steps", x, y, [Curve(rate, 2)]))]


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
        low, high = min(ranks.values(), default=0.0), max(ranks.values(), default=1.0)
        heat = heat_map(ranks, low * 0.6 if low < high else 0, high, "{:.3g}".format, "chosen rank")
        note = "The stronger the colour, the larger; at the right, a row's mean."
        figures += [Figure(f"Chosen ranks{name}", None, note, True, heat)] if heat else []
    return figures


def heat_map(values: Mapping[str, float], low: float, high: float, text: Callable[[float], str], what: str,
             order: Sequence[str] = ()) -> Heat | None:  # fmt: skip
    """Of names like 'model.layers.3.mlp.up_proj' or '3.up_proj'; others are left out. ``order``: of the rows."""
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
        shade = 0.06 + 0.94 * min(1.0, max(0.0, (value - low) / ((high - low) or 1)))
        return f"layer {layer}, {module}: {text(value)}", round(shade, 3)

    names = sorted(rows, key=lambda name: order.index(name) if name in order else len(order))
    shown = [(name, [cell(name, layer) for layer in layers], text(sum(rows[name].values()) / len(rows[name])))
             for name in names]  # fmt: skip
    return Heat(f"{what} by layer and module", layers, shown) if shown else None


def sparsity(section: Section, measured: Mapping[str, Histogram]) -> list[Figure]:
    """Heat maps of the share of zeros: as each pruning stage wrote it down, and as counted in merged weights."""
    found: list[Figure] = []
    order: list[str] = []  # of the rows, as the model runs them; files are in order of the alphabet
    for stage in section.stages:
        values, counts = stage.metrics.get("by_module"), measured.get(stage.key)
        if not isinstance(values, dict):
            if stage.kind != "merge" or counts is None or counts.modules < counts.of_modules:
                continue
            values = {name: zeros / weights for name, (zeros, weights) in counts.zeros.items()}
        shares = numbers(values)
        heat = heat_map(shares, 0, 1, lambda v: f"{v * 100:.2f} %", f"share of zeros, {stage.name},", order)
        if heat:
            order = order or [name for name, _, _ in heat.rows]
            ends = f"{min(shares.values()) * 100:.2f} % to {max(shares.values()) * 100:.2f} %"
            title = f"{'Pruned' if stage.kind == 'sparsify' else 'Zero'}, after {stage.name}"
            note = f"{ends}; the stronger the colour, the more zeros. At the right, a row's mean."
            found.append(Figure(title, None, note, len(heat.layers) > 8, heat))
    return found[:SHOWN]


def weights(section: Section, measured: dict[str, Histogram]) -> list[Figure]:
    """Histograms before and after, of the first merges (or, without one, quantized or sparse models).

    Fills ``measured`` with what was counted, by the stages' keys.
    """
    kinds = ("merge", "quantize", "sparsify")
    ends = next((found for kind in kinds if (found := [s for s in section.stages if s.kind == kind])), [])
    groups: dict[tuple[str, ...], list[tuple[Stage, WeightFolder]]] = {}
    for end in ends[:SHOWN]:
        lineage = [stage for stage in section.lineage(end)[::-1] if stage.kind in WITH_WEIGHTS]
        opened = [(stage, folder) for stage in lineage if (folder := _open(section, stage)) is not None]
        for packed in (True, False):
            group = [(stage, folder) for stage, folder in opened if folder.packed == packed]
            if len(group) > 1 or (group and not groups):
                groups.setdefault(tuple(stage.key for stage, _ in group), group)
    found = []
    for group in groups.values():
        try:
            found.append(_before_and_after(group, measured))
        except (SqftError, OSError) as error:
            section.note(f"no histogram: {error}")
    if len(ends) > SHOWN:
        section.note(f"weights are shown of the first {SHOWN} of {len(ends)} {ends[0].kind} stages")
    return found


def _open(section: Section, stage: Stage) -> WeightFolder | None:
    if not any(stage.folder.glob("model*.safetensors")):
        return None
    try:
        return WeightFolder(stage.folder)
    except SqftError as error:
        section.note(str(error))
        return None


def _before_and_after(group: Sequence[tuple[Stage, WeightFolder]], measured: dict[str, Histogram]) -> Figure:
    """A histogram of folders of one kind, all packed or all float, over the modules that all of them have."""
    (start, first), (end, last) = group[0], group[-1]
    sizes = {name: size for name, size in first.sizes.items() if all(name in folder.sizes for _, folder in group)}
    if not sizes:
        raise SqftError(f"{first.folder} has no linear weights that {last.folder} has as well")
    names = chosen(sizes)
    reach = 0.0 if first.packed else spread(first, names)
    bars, notes = [], []
    for i, (stage, folder) in enumerate(group):
        if stage.key not in measured or not first.packed:
            measured[stage.key] = count_levels(folder, names) if first.packed else count_values(folder, names, reach)
        counts = measured[stage.key]
        total = counts.total or 1
        shares = {value: number / total for value, number in counts.kept.items()}
        bars.append(Bars(stage.name, shares, counts.pruned / total, (7, 0, 2, 3)[i % 4] if len(group) > 1 else 0))
        notes += [f"{stage.name}: {counts.pruned / total * 100:.2f} % pruned"] if counts.pruned else []
        notes += [f"{stage.name}: {counts.beyond / total * 100:.2g} % lie beyond the axis"] if counts.beyond else []
    notes.append(f"{measured[start.key].modules} of {measured[start.key].of_modules} weight matrices")
    kind, label = "Float", f"weight ({BINS} bins)"
    if first.packed:
        kind, label = f"{precision(start)} grid", "integer level, from the zero point"
        share, farthest = moves(first, last, names)
        notes += [f"{share * 100:.2f} % of the kept integers moved, by at most {farthest}"] if end is not start else []
    pruned = "The pale bar at 0, cut off, is what is pruned. " if any(one.pruned for one in bars) else ""
    title = f"{kind}: {start.name}" + (f" to {end.name}" if end is not start else "")
    chart = histogram(bars, label, _signed, f"histogram of weights, {title}", outline=not first.packed)
    return Figure(title, chart, pruned + "; ".join(notes) + ".")


def _signed(value: float) -> str:
    return f"{value:+.3g}" if abs(value) > 1e-9 else "0"
