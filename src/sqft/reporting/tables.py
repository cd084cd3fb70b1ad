"""One table, three ways to write it: terminal, Markdown, and (``page.html``) HTML; and how its numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Column(NamedTuple):
    """Shows a row's value ``key`` by ``text``, and its 95 % interval if the row has ``key``_ci95."""

    title: str
    key: str
    text: Callable[[Any], str] = str

    def cell(self, row: Mapping[str, Any]) -> str:
        if (value := row.get(self.key)) is None:
            return "-"
        low, high = map(self.text, row.get(f"{self.key}_ci95") or (value, value))
        return self.text(value) + (f" ({low.removesuffix(' %')} - {high})" if f"{self.key}_ci95" in row else "")


@dataclass(frozen=True)
class Table:
    """Rows of plain data under columns; ``strong``: the row that stands out on the page."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    strong: Mapping[str, Any] | None = None

    def cells(self) -> list[list[str]]:
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        lines = [[column.title for column in self.columns], *self.cells()]
        head, *body = ("| " + " | ".join(map(escape_cell, line)) + " |" for line in lines)
        return "\n".join([head, "|" + "---|" * len(self.columns), *body]) + "\n"

    def show(self) -> None:
        """To standard output; when that is no terminal, as wide as needed."""
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text  # what is in square brackets is text of the data, not rich's markup

        grid = Grid()
        for column in self.columns:
            grid.add_column(Text(column.title))
        for line in self.cells():
            grid.add_row(*map(Text, line))
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(grid)


def escape_cell(text: str) -> str:
    """Text that cannot end a cell or start HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def share(value: float) -> str:
    """Cut, not rounded up: 99.999 % never reads 100 %."""
    return f"{int(value * 1e5 + 1e-9) / 1e3:.3f} %"


def points(pair: tuple[float, float]) -> str:
    return f"{pair[0] * 100:+.1f} to {pair[1] * 100:+.1f}"


def count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def millions(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:.0f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
