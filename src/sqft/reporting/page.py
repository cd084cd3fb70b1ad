"""``sqft report``: folders of runs to one HTML page that needs nothing else, and its tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sqft import artifact, drawing
from sqft.errors import UsageError
from sqft.registry import PARTS
from sqft.reporting import facts, figures
from sqft.reporting.collect import Section, read_section
from sqft.reporting.commands import section_commands
from sqft.reporting.tables import escape_cell


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Writes the report of the folders to ``out`` (default: report.html in the first one) and its Markdown beside it.
    Returns where they are, and notes of what could not be read. Raises UsageError for a folder without stages."""
    roots = list(dict.fromkeys(Path(folder) for folder in folders))
    path = Path(out) if out is not None else roots[0] / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {path}: name a file that ends in .html")
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: name a file in it, e.g. {path / 'report.html'}")
    names = [root.absolute().name for root in roots]
    titles = names if len(set(names)) == len(names) and all(names) else map(str, roots)
    sections = [read_section(root, title) for root, title in zip(roots, titles, strict=True)]
    stages, markdown = sum(len(section.written) for section in sections), path.with_suffix(".md")
    for file, text in ((path, _page(sections, stages)), (markdown, "\n".join(map(_markdown, sections)))):
        artifact.write_text(file, text.encode("utf-8", "replace").decode())  # data may hold halves of characters
    notes = dict.fromkeys(note for section in sections for note in section.notes)
    return {"report": str(path), "markdown": str(markdown), "sections": len(sections), "stages": stages,
            **({"notes": "; ".join(notes)} if notes else {})}  # fmt: skip


def _page(sections: Sequence[Section], stages: int) -> str:
    """What ``page.html`` makes of the sections; jinja2 escapes whatever comes from them."""
    files = resources.files("sqft.reporting")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["draw"] = drawing.draw
    environment.globals |= {"facts": facts, "figures": figures, "commands": section_commands, "parts": PARTS}
    style = f":root {{{drawing.VARIABLES} }}\n{drawing.STYLE}{(files / 'report.css').read_text(encoding='utf-8')}"
    heading = ", ".join(section.title for section in sections[:4]) + (" ..." if len(sections) > 4 else "")
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(sections=sections, stages=stages, heading=heading, style=style)


def _markdown(section: Section) -> str:
    """Verdict, tables and commands."""
    pieces = [f"# {escape_cell(section.title)}\n\n{escape_cell(facts.verdict(section))}\n"]
    tables = [facts.method_table(section), facts.stage_table(section), facts.zeros_table(section)]
    pieces += [t.markdown() for t in [*tables, *(PARTS[title](section)[0] for title in PARTS)] if t.rows]
    if lines := section_commands(section):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))  # longer than any in the commands
        pieces.append(f"{fence}bash\n{lines}\n{fence}\n")
    return "\n".join([*pieces, "".join(f"- {escape_cell(note)}\n" for note in section.notes)]).rstrip("\n") + "\n"
