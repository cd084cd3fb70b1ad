"""The pipeline as a picture: a card a stage, in a row, or a tree where several stages start from one."""

from __future__ import annotations

from html import escape

from sqft.measuring.size import human
from sqft.reporting.collect import Section, Stage, number, serving_bytes
from sqft.reporting.facts import accuracy, precision
from sqft.reporting.grids import pictogram


def flow(section: Section) -> str:
    """The picture; empty if there is no stage that was made from something."""
    known = {stage.key for stage in section.stages}
    roots = [stage for stage in section.stages if stage.source not in known]
    if len(section.stages) < 2:
        return ""
    branching = any(len(_children(section, stage)) > 1 for stage in section.stages) or len(roots) > 1
    kind = "flow tree" if branching else "flow"
    inside = "".join(_branch(section, root, branching) for root in roots)
    return f'<div class="scroll"><div class="{kind}">{inside}</div></div>'


def _children(section: Section, stage: Stage) -> list[Stage]:
    return [other for other in section.stages if other.source == stage.key and other is not stage]


def _branch(section: Section, stage: Stage, compact: bool) -> str:
    """A stage, the stages after it while there is one each, then its branches."""
    cards, seen = [_card(section, stage, compact)], {stage.key}
    children = _children(section, stage)
    while len(children) == 1 and children[0].key not in seen:
        seen.add(children[0].key)
        cards.append(_card(section, children[0], compact))
        children = _children(section, children[0])
    below = "".join(_branch(section, child, compact) for child in children if child.key not in seen)
    branches = f'<div class="branches">{below}</div>' if below else ""
    return f'<div class="branch"><div class="chain">{"".join(cards)}</div>{branches}</div>'


def _card(section: Section, stage: Stage, compact: bool) -> str:
    value, detail = _key_number(section, stage)
    score = next((a for s in stage.scores.values() if (a := number(s, "accuracy")) is not None), None)
    badge = "" if score is None else f'<span class="badge">{accuracy(score)} accuracy</span>'
    picture = "" if compact else pictogram(stage.kind)
    where, _, last = stage.name.rpartition("/")
    name = stage.name if stage.kind == "model" else last or stage.kind
    place = f'<span class="where">{escape(where)}</span>' if compact and where and stage.kind != "model" else ""
    return (f'<div class="card {escape(stage.kind)}">{picture}<div>{place}<b>{escape(name)}</b>'
            f'<span class="value">{escape(value)}</span><span class="detail">{escape(detail)}</span>{badge}</div>'
            "</div>")  # fmt: skip


def _key_number(section: Section, stage: Stage) -> tuple[str, str]:
    """What a stage's card says: a number and what it is."""
    metrics = stage.metrics
    sparsity, size = number(metrics, "sparsity"), serving_bytes(stage, section)
    if stage.kind == "sparsify" and sparsity is not None:
        return f"{sparsity * 100:.1f} %", f"pruned by {stage.config.get('method', '?')}"
    if stage.kind == "quantize":
        bits = number(metrics, "bits_per_weight")
        return precision(stage), f"{bits:.2f} bits a weight" if bits else f"by {stage.config.get('method', '?')}"
    if stage.kind == "train":
        weights = number(metrics, "trainable_parameters")
        return _millions(weights), f"trained, {stage.config.get('adapter', '?')}"
    if stage.kind in ("search", "extract"):
        tried, weights = number(metrics, "evaluated"), number(metrics, "parameters")
        return _millions(weights), f"kept, {tried:.0f} tried" if tried else "kept"
    if stage.kind == "merge":
        kept = number(metrics, "zeros_kept")
        return human(size) if size else "-", "-" if kept is None else f"{_floor(kept)} zeros kept"
    return human(size) if size else "-", "the start" if stage.kind == "model" else stage.kind


def _floor(value: float) -> str:
    """Cut, not rounded: 99.99 % never reads 100 %."""
    return f"{int(value * 1e4 + 1e-9) / 1e2:g} % of"


def _millions(weights: float | None) -> str:
    return "-" if weights is None else f"{weights / 1e6:.2f} M" if weights >= 1e5 else f"{weights:.0f}"
