"""A section's charts, as figures: score over size, training, search, sparsity by layer, weights before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqft.errors import SqftError
from sqft.measuring.size import human
from sqft.reporting.collect import Section, Stage, finite, number, read_lines
from sqft.reporting.elements import figure, legend
from sqft.reporting.facts import Point, chart_points, precision
from sqft.reporting.grids import Bars, by_layer, heat_map, histogram
from sqft.reporting.svg import COLOURS, Mark, Series, lines, make_axis, percent, plain, scatter
from sqft.reporting.weights import (
    BINS,
    Counts,
    WeightFolder,
    chosen,
    count_levels,
    count_values,
    moves,
    spread,
)
from sqft.searching.choose import read_points
from sqft.searching.picking import Evaluated as Trial
from sqft.searching.picking import pareto_front

CURVE_POINTS = 400  # of a training curve; more would not be seen
WITH_WEIGHTS = ("model", "sparsify", "quantize", "merge", "save")
SHOWN = 4  # searches and histograms of a section; runs of a comparison are alike


def score_over_size(sections: Sequence[Section]) -> list[str]:
    """A figure for each metric. Of one section, merged models have a colour of their own; of several, each section."""
    found: dict[str, list[tuple[int, Point]]] = {}
    for i, section in enumerate(sections):
        for point in chart_points(section):
            found.setdefault(point.metric, []).append((i, point))
    return [_score_figure(metric, points, sections) for metric, points in found.items() if len(points) > 1]


def _score_figure(metric: str, points: Sequence[tuple[int, Point]], sections: Sequence[Section]) -> str:
    several = len(sections) > 1
    merging = any(point.merged is not None for _, point in points)
    kinds = {True: 0, False: 1, None: 7 if merging else 0}
    colour: Callable[[int, Point], int] = lambda i, p: i if several else kinds[p.merged]  # noqa: E731
    marks = [Mark(p.name, p.size, p.score, colour(i, p), f"{p.name}: {_score(metric, p)}, {human(p.size)}", p.interval,
                  "square" if p.merged else "dot") for i, p in points]  # fmt: skip
    share = metric.startswith("accuracy")
    heights = [end for _, p in points for end in (*(p.interval or ()), p.score)]
    y = make_axis(metric, heights, percent if share else plain, limits=(0, 1) if share else (0, float("inf")))
    sizes = [p.size for _, p in points]
    x, rough = (make_axis("size to serve", sizes, short_size, margin=0.12, limits=(0, float("inf")), count=count)
                for count in (8, 3))  # fmt: skip
    summary = f"{metric} over size of {len(points)} models"
    both = _both(scatter(marks, x, y, summary, width=1060, height=380),
                 scatter(marks, rough, y, summary, width=372, height=420))  # fmt: skip
    if several:
        keys = [(i, sections[i].title) for i in sorted({i for i, _ in points})]
    else:
        names = ((True, "merged into one model"), (False, "base and adapter"), (None, "not adapted"))
        present = {point.merged for _, point in points} if merging else set()
        keys = [(kinds[kind], name) for kind, name in names if kind in present]
    bars = " Bars are 95 % intervals." if any(p.interval for _, p in points) else ""
    better = "up and to the left is better" if share else "down and to the left is better"
    return both + legend(keys) + f'<p class="note">{metric.capitalize()}: {better}.{bars}</p>'


def _both(wide: str, narrow: str) -> str:
    """A chart for wide pages and the same for phones: of the two the page shows one."""
    return figure("", wide, kind="wide") + figure("", narrow, kind="narrow")


def short_size(size: float) -> str:
    """'200 MB' where ``human`` writes '200.0 MB'."""
    value, unit = human(size).split()
    return f"{float(value):g} {unit}"


def _score(metric: str, point: Point) -> str:
    return percent(point.score) if metric.startswith("accuracy") else f"{metric} {point.score:.2f}"


def training(section: Section) -> list[str]:
    """Loss over steps, all trainings in one chart; of a single training also the learning rate."""
    logs = [(stage, read_lines(section, stage.folder / "training_log.jsonl"))
            for stage in section.stages if stage.kind == "train"]  # fmt: skip
    logs = [(stage, log) for stage, log in logs if _curve(log, "loss")]
    if not logs:
        return []
    curves, keys = [], []
    for i, (stage, log) in enumerate(logs[:COLOURS]):
        held_out = _curve(log, "eval_loss")
        colour = 0 if len(logs) == 1 else i
        curves.append(Series(stage.name, _curve(log, "loss"), colour))
        keys.append((colour, "training loss" if len(logs) == 1 else stage.name))
        if held_out:
            kind = "dots" if len(held_out) == 1 else "dashed"
            curves.append(Series(f"{stage.name}, held out", held_out, 1 if len(logs) == 1 else i, kind))
            keys += [(1, "held-out loss")] if len(logs) == 1 else []
    x = make_axis("step", [p[0] for c in curves for p in c.points], margin=0.02, limits=(0, float("inf")), whole=True)
    y = make_axis("", [p[1] for c in curves for p in c.points], zero=True)
    note = "Dashed, or a single dot: held-out loss." if len(logs) > 1 else ""
    if len(logs) > COLOURS:
        note += f" The first {COLOURS} of {len(logs)} trainings."
    summary = "loss over training steps"
    if len(logs) > 1:
        both = _both(lines(curves, x, y, summary, width=1060, height=340), lines(curves, x, y, summary, width=372))
        return [f'<div class="full">{both}{legend(keys)}<p class="note">{note}</p></div>']
    found = [figure("Loss", lines(curves, x, y, summary), note, legend(keys))]
    rate = _curve(logs[0][1], "learning_rate")
    if len(rate) > 1:
        y = make_axis("", [p[1] for p in rate], zero=True)
        svg = lines([Series("learning rate", rate, 2)], x, y, "learning rate over steps")
        found.append(figure("Learning rate", svg))
    return found


def _curve(log: Sequence[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have both, thinned, the last one kept."""
    pairs = [(number(entry, "step"), number(entry, name)) for entry in log]
    points = [(step, value) for step, value in pairs if step is not None and value is not None]
    return points[:: -(-len(points) // CURVE_POINTS)][:-1] + points[-1:] if points else []


def search(section: Section) -> list[str]:
    """How each search went, score over cost, and the ranks that it chose."""
    stages = [stage for stage in section.stages if stage.kind == "search"]
    figures: list[str] = []
    for stage in stages[:SHOWN]:
        try:
            trials = read_points(stage.folder)
            trials = [t for t in trials if finite(t.score) is not None and finite(t.cost) is not None]
        except SqftError as error:
            section.notes.append(str(error))
            continue
        name = f" of {stage.name}" if len(stages) > 1 else ""
        if len(trials) > 1:
            figures += _trials(stage, trials, name)
        figures += _ranks(stage, name)
    return figures


def _ranks(stage: Stage, name: str) -> list[str]:
    ranks = finite_values(stage.metrics.get("ranks"))
    table = by_layer(ranks)
    if not table:
        return []
    values = list(ranks.values())
    low = 0 if min(values) == max(values) else min(values) * 0.6
    svg = heat_map(table, low, max(values), lambda v: f"{v:.3g}", "chosen rank by layer and module")
    return [figure(f"Chosen ranks{name}", svg, "Darker is larger; at the right, a row's mean.", kind="full")]


def finite_values(values: Any) -> dict[str, float]:
    """The finite numbers of what should be a mapping."""
    pairs = values.items() if isinstance(values, dict) else ()
    return {str(key): number for key, value in pairs if (number := finite(value)) is not None}


def _trials(stage: Stage, trials: Sequence[Trial], name: str) -> list[str]:
    score = "validation log-likelihood a token" if stage.config.get("metric") == "loss" else "validation accuracy"
    cost = "seconds of a forward pass" if stage.config.get("cost") == "latency" else "adapter weights"
    best = [max(t.score for t in trials[: i + 1]) for i in range(len(trials))]
    picked = next((i for i, t in enumerate(trials) if t.number == stage.metrics.get("trial")), None)
    y = make_axis(score, [t.score for t in trials], margin=0.15)

    def marks(place: Callable[[int, Trial], float]) -> list[Mark]:
        shown = [Mark(str(t.kind), place(i, t), t.score, 3 if t.kind else 7, f"{t.kind or 'tried'}: {t.score:.5g}")
                 for i, t in enumerate(trials)]  # fmt: skip
        if picked is not None:
            t = trials[picked]
            shown.append(Mark("", place(picked, t), t.score, 1, f"chosen: {t.score:.5g}", None, "ring"))
        return shown

    order = make_axis("sub-adapters evaluated", [1, len(trials)], margin=0.05, whole=True)
    steps = Series("best so far", [(i + 1, value) for i, value in enumerate(best)], 0, "step")
    progress = lines([steps], order, y, "score of each sub-adapter in order", marks(lambda i, t: i + 1))
    front = sorted((t.cost, t.score) for t in pareto_front(trials))
    x = make_axis(cost, [t.cost for t in trials], margin=0.12)
    pareto = scatter(marks(lambda i, t: t.cost), x, y, "score over cost", [Series("Pareto front", front, 0)])
    return [
        figure(f"Search progress{name}", progress, "", legend([(0, "best so far"), (7, "tried")], "chosen")),
        figure(f"Score over cost{name}", pareto, "", legend([(0, "Pareto front"), (7, "tried")], "chosen")),
    ]


def sparsity(section: Section, measured: dict[str, Counts]) -> list[str]:
    """Heat maps of the share of zeros: as each pruning stage wrote it down, and as counted in merged weights."""
    found = []
    order: list[str] = []  # of the rows, as the model runs them; files are in order of the alphabet
    for stage in section.stages:
        values = stage.metrics.get("by_module")
        title = "Pruned" if stage.kind == "sparsify" else "Zero"
        if not isinstance(values, dict):
            counts = measured.get(stage.key)
            if stage.kind != "merge" or counts is None or counts.modules < counts.of_modules:
                continue
            values = {name: zeros / weights for name, (zeros, weights) in counts.zeros.items()}
        shares = finite_values(values)
        table = by_layer(shares)
        order = order or list(table)
        table = dict(sorted(table.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order)))
        if table:
            summary = f"share of zeros by layer and module, {stage.name}"
            svg = heat_map(table, 0, 1, lambda v: f"{v * 100:.2f} %", summary)
            ends = f"{min(shares.values()) * 100:.2f} % to {max(shares.values()) * 100:.2f} %"
            note = f"{ends}; darker has more zeros. At the right, a row's mean."
            kind = "full" if max(map(len, table.values())) > 8 else ""
            found.append(figure(f"{title}, after {stage.name}", svg, note, kind=kind))
    return found[:SHOWN]


def weights(section: Section, measured: dict[str, Counts]) -> list[str]:
    """Histograms before and after, of the first merges (or, without one, quantized or sparse models).

    Fills ``measured`` with what was counted, by the stages' keys.
    """
    ends = [s for s in section.stages if s.kind == "merge"] or [s for s in section.stages if s.kind == "quantize"]
    ends = ends or [s for s in section.stages if s.kind == "sparsify"]
    drawn: set[tuple[str, ...]] = set()
    found = []
    for end in ends[:SHOWN]:
        lineage = [stage for stage in section.lineage(end)[::-1] if stage.kind in WITH_WEIGHTS]
        opened = [(stage, folder) for stage in lineage if (folder := _open(section, stage)) is not None]
        for packed, draw in ((True, _levels), (False, _values)):
            group = [(stage, folder) for stage, folder in opened if folder.packed == packed]
            keys = tuple(stage.key for stage, _ in group)
            if not group or keys in drawn or (len(group) == 1 and drawn):
                continue
            drawn.add(keys)
            try:
                found.append(draw(group, measured))
            except (SqftError, OSError) as error:
                section.notes.append(f"no histogram: {error}")
    if len(ends) > SHOWN:
        section.notes.append(f"weights are shown of the first {SHOWN} of {len(ends)} {ends[0].kind} stages")
    return found


def _open(section: Section, stage: Stage) -> WeightFolder | None:
    if not any(Path(stage.folder).glob("model*.safetensors")):
        return None
    try:
        return WeightFolder(stage.folder)
    except SqftError as error:
        if str(error) not in section.notes:
            section.notes.append(str(error))
        return None


def _levels(group: Sequence[tuple[Stage, WeightFolder]], measured: dict[str, Counts]) -> str:
    names = _common(group)
    counted = [(stage, measured.get(stage.key) or count_levels(folder, names)) for stage, folder in group]
    measured.update({stage.key: counts for stage, counts in counted})
    title = _title(f"{precision(group[0][0])} grid", group)
    moved = ""
    if len(group) > 1:
        share, farthest = moves(group[0][1], group[-1][1], names)
        moved = f"{share * 100:.2f} % of the kept integers moved, by at most {farthest}"
    return _histogram(title, counted, "integer level, from the zero point", lambda v: f"{v:+.0f}" if v else "0", moved)


def _values(group: Sequence[tuple[Stage, WeightFolder]], measured: dict[str, Counts]) -> str:
    names = _common(group)
    reach = spread(group[0][1], names)
    counted = [(stage, count_values(folder, names, reach)) for stage, folder in group]
    measured.update({stage.key: counts for stage, counts in counted})
    text: Callable[[float], str] = lambda v: f"{v:+.3g}" if abs(v) > 1e-9 else "0"  # noqa: E731
    return _histogram(_title("Float", group), counted, f"weight ({BINS} bins)", text, outline=True)


def _title(what: str, group: Sequence[tuple[Stage, WeightFolder]]) -> str:
    first, last = group[0][0].name, group[-1][0].name
    return f"{what}: {first}" + (f" to {last}" if len(group) > 1 else "")


def _common(group: Sequence[tuple[Stage, WeightFolder]]) -> list[str]:
    """The modules to read: those that all folders have, within the budget."""
    sizes = {name: size for name, size in group[0][1].sizes.items() if all(name in f.sizes for _, f in group)}
    if not sizes:
        raise SqftError(f"{group[0][1].folder} has no linear weights that {group[-1][1].folder} has as well")
    return chosen(sizes)


def _histogram(title: str, counted: Sequence[tuple[Stage, Counts]], label: str, text: Callable[[float], str],
               moved: str = "", outline: bool = False) -> str:  # fmt: skip
    groups, notes = [], []
    for i, (stage, counts) in enumerate(counted):
        total = counts.total or 1
        shares = {value: number / total for value, number in counts.kept.items()}
        colour = (7, 0, 2)[i] if len(counted) == 3 else (7, 0)[i % 2] if len(counted) == 2 else 0
        groups.append(Bars(stage.name, shares, counts.pruned / total, colour))
        if counts.pruned:
            notes.append(f"{stage.name}: {counts.pruned / total * 100:.2f} % pruned")
        if counts.beyond:
            notes.append(f"{stage.name}: {counts.beyond / total * 100:.2g} % lie beyond the axis")
    read, all_of = counted[0][1].modules, counted[0][1].of_modules
    notes.append(f"{read} of {all_of} weight matrices")
    if moved:
        notes.append(moved)
    keys = [(bars.colour, bars.label) for bars in groups]
    svg = histogram(groups, label, text, f"histogram of weights, {title}", outline)
    pruned = "The pale bar at 0, cut off, is what is pruned. " if any(bars.pruned for bars in groups) else ""
    return figure(title, svg, pruned + "; ".join(notes) + ".", legend(keys))
