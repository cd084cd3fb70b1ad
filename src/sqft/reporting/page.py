"""``sqft report``: folders of runs to one HTML page that needs nothing else, and its tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.errors import UsageError
from sqft.reporting import charts, facts
from sqft.reporting.collect import Section, read_section
from sqft.reporting.commands import section_commands
from sqft.reporting.elements import bold, part, table
from sqft.reporting.flow import flow
from sqft.reporting.table import markdown
from sqft.reporting.weights import Counts

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><p class="brand">sqft report</p><h1>{heading}</h1>{contents}</header>
<main>
{body}
</main>
<footer>Written by sqft report from {stages} stage folders. It needs no script and no network.</footer>
</body>
</html>
"""


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Writes the report of the folders to ``out`` (default: report.html in the first one) and its Markdown beside it.

    Returns where they are, and notes of what could not be read. Raises UsageError for a folder without stages.
    """
    roots = list(dict.fromkeys(Path(folder) for folder in folders))
    sections = [read_section(root, title) for root, title in zip(roots, _titles(roots), strict=True)]
    path = _check_out(Path(out) if out is not None else roots[0] / "report.html")
    page = _page(sections)
    for file, text in ((path, page), (path.with_suffix(".md"), _markdown(sections))):
        artifact.write_text(file, text.encode("utf-8", "replace").decode())  # data may hold halves of characters
    notes = list(dict.fromkeys(note for section in sections for note in section.notes))
    return {"report": str(path), "markdown": str(path.with_suffix(".md")), "sections": len(sections),
            "stages": _count(sections), **({"notes": "; ".join(notes)} if notes else {})}  # fmt: skip


def _titles(roots: Sequence[Path]) -> list[str]:
    names = [root.absolute().name or str(root) for root in roots]
    return names if len(set(names)) == len(names) else [str(root) for root in roots]


def _count(sections: Sequence[Section]) -> int:
    return sum(stage.manifest is not None for section in sections for stage in section.stages + section.evaluations)


def _check_out(path: Path) -> Path:
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {path}: name a file that ends in .html")
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: name a file in it, e.g. {path / 'report.html'}")
    return path


def _page(sections: Sequence[Section]) -> str:
    several = len(sections) > 1
    heading = ", ".join(section.title for section in sections[:4]) + (" ..." if len(sections) > 4 else "")
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = [_section(section, i, several) for i, section in enumerate(sections)]
    if several:
        combined = part("Score over size, all folders", _scores(sections))
        body.insert(0, f'<div class="section">{combined}</div>' if combined else "")
    style = (resources.files("sqft.reporting") / "report.css").read_text(encoding="utf-8")
    return PAGE.format(
        title=escape(f"sqft: {heading}"), heading=escape(heading), style=style, body="\n".join(body),
        contents=f"<nav>{links}</nav>" if several else "", stages=_count(sections),
    )  # fmt: skip


def _section(section: Section, index: int, several: bool) -> str:
    measured: dict[str, Counts] = {}
    weights = charts.weights(section, measured)
    heading = f"<h2>{escape(section.title)}</h2>" if several else ""
    first = [
        part("Pipeline", flow(section)),
        part("Methods", _methods(section)),
        part("Score over size", _scores([section])),
    ]
    parts = [
        f'<p class="verdict">{bold(facts.verdict(section))}</p>', _tiles(section),
        *(reversed(first) if section.methods else first),
        part("Stages", _stages(section)),
        part("Training", _grid(charts.training(section))),
        part("Search", _grid(charts.search(section))),
        part("Zeros kept", _zeros(section), "What merging and quantizing checked, weight by weight."),
        part("Sparsity by layer and module", _grid(charts.sparsity(section, measured))),
        part("Weights before and after", _grid(weights)),
        part("Samples", _samples(section), "The first problem of each pattern of right and wrong, the most frequent "
             "pattern first."),
        part("Reproduce", _commands(section)),
        part("Environment", _environment(section)),
        part("Notes", _notes(section)),
    ]  # fmt: skip
    return f'<div class="section" id="s{index}">{heading}{"".join(parts)}</div>'


def _scores(sections: Sequence[Section]) -> str:
    return "".join(f'<div class="score">{figure}</div>' for figure in charts.score_over_size(sections))


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _tiles(section: Section) -> str:
    shown = [f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}<small>{escape(tile.detail)}</small></dd>"
             "</div>" for tile in facts.tiles(section)]  # fmt: skip
    return f'<dl class="tiles">{"".join(shown)}</dl>' if shown else ""


def _methods(section: Section) -> str:
    if not section.methods:
        return ""
    best = facts.best_methods(section)[0]
    strong = [i for i, method in enumerate(section.methods) if method is best]
    return f'<div class="many">{table(facts.method_header(section), facts.method_rows(section), strong)}</div>'


def _stages(section: Section) -> str:
    final = facts.final_stage(section)
    rows = facts.stage_rows(section)
    strong = [i for i, row in enumerate(rows) if final and row[0] == final.name]
    return table(facts.stage_header(), rows, strong) if rows else ""


def _zeros(section: Section) -> str:
    rows = facts.zero_rows(section)
    return table(facts.ZEROS_HEADER, rows) if rows else ""


def _samples(section: Section) -> str:
    shown = []
    for sample in facts.samples(section):
        answers = "".join(_answer(*answer) for answer in sample.answers)
        wanted = f'<p class="wanted">Expected: <b>{escape(_cut(sample.answer))}</b></p>' if sample.answer else ""
        shown.append(f'<article><pre class="prompt">{escape(_cut(sample.prompt))}</pre>{wanted}'
                     f'<div class="answers">{answers}</div></article>')  # fmt: skip
    return "".join(shown)


def _answer(name: str, text: str, correct: bool | None) -> str:
    kind = "unknown" if correct is None else "right" if correct else "wrong"
    mark = {"right": "✓ right", "wrong": "✗ wrong", "unknown": ""}[kind]
    shown = escape(_cut(text.strip())) or "<i>nothing</i>"
    return f'<div class="{kind}"><h4>{escape(name)}<span>{mark}</span></h4><pre>{shown}</pre></div>'


def _cut(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit} more characters)"


def _commands(section: Section) -> str:
    found = section_commands(section)
    lines = "\n".join(command.line for command in found if command.line)
    notes = "".join(f"<li>{escape(command.note)}</li>" for command in found if command.note)
    shown = f'<pre class="commands scroll" tabindex="0">{escape(lines)}</pre>' if lines else ""
    return shown + (f'<ul class="note">{notes}</ul>' if notes else "")


def _environment(section: Section) -> str:
    versions = facts.environment_rows(section)
    if not versions:
        return ""
    seeds = table(("stage", "seed", "written (UTC)", "key"), facts.seed_rows(section))
    return f'<div class="figures"><div>{table(("package", "version"), versions)}</div><div>{seeds}</div></div>'


def _notes(section: Section) -> str:
    notes = dict.fromkeys(section.notes)
    return f'<ul class="note">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""


def _markdown(sections: Sequence[Section]) -> str:
    """Verdicts, tables and commands."""
    pieces = []
    for section in sections:
        pieces.append(f"# {_cell(section.title)}\n\n{_cell(facts.verdict(section))}\n")
        if section.methods:
            pieces.append(_md_table(facts.method_header(section), facts.method_rows(section)))
        if section.stages:
            pieces.append(_md_table(facts.stage_header(), facts.stage_rows(section)))
        zeros = facts.zero_rows(section)
        if zeros:
            pieces.append(_md_table(facts.ZEROS_HEADER, zeros))
        found = section_commands(section)
        lines = [command.line for command in found if command.line]
        if lines:
            longest = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
            fence = "`" * max(3, longest + 1)  # longer than any run of back-ticks in the commands
            pieces.append(f"{fence}bash\n" + "\n".join(lines) + f"\n{fence}\n")
        notes = [*(command.note for command in found if command.note), *dict.fromkeys(section.notes)]
        if notes:
            pieces.append("".join(f"- {_cell(note)}\n" for note in notes))
    return "\n".join(pieces)


def _md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(header, [[_cell(value) for value in row] for row in rows])


def _cell(text: str) -> str:
    """Text that cannot end a cell or start HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
