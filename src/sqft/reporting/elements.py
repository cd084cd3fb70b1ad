"""Pieces of HTML. Whatever comes from data passes through ``escape`` here, or is an SVG that has done so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from sqft.reporting.svg import COLOURS


def bold(text: str) -> str:
    """Escaped, with **words** between double asterisks in bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))


def legend(items: Sequence[tuple[int, str]], ring: str = "") -> str:
    """(colour, label) pairs under a chart; ``ring``: the label of a circled point."""
    shown = [f'<li><i class="key c{colour % COLOURS}"></i>{escape(label)}</li>' for colour, label in items]
    if ring:
        shown.append(f'<li><i class="key ring c1"></i>{escape(ring)}</li>')
    return f'<ul class="legend">{"".join(shown)}</ul>' if len(shown) > 1 else ""


def figure(title: str, svg: str, caption: str = "", below: str = "", kind: str = "") -> str:
    """A chart with a title, a legend and a caption; it scrolls within itself where it is too wide."""
    note = f"<p>{escape(caption)}</p>" if caption else ""
    return (f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption><div class="scroll">{svg}</div>'
            f"{below}{note}</figure>")  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[int] = ()) -> str:
    """A table that scrolls within itself; the rows numbered in ``strong`` stand out."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = []
    for i, row in enumerate(rows):
        first, *rest = row
        values = "".join(f"<td>{escape(value)}</td>" for value in rest)
        kind = ' class="strong"' if i in strong else ""
        body.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{values}</tr>')
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>")  # fmt: skip


def part(title: str, inside: str, lead: str = "") -> str:
    """A headed part of a section; nothing if there is nothing in it."""
    note = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section class="part"><h3>{escape(title)}</h3>{note}{inside}</section>' if inside else ""
