"""The rows of ``bench`` as a table, a line for each model, runtime and case, and as a part of the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqft.drawing import Chart, Series
from sqft.measuring.size import human
from sqft.reporting.collect import Section, numbers
from sqft.reporting.figures import Figure
from sqft.reporting.tables import Column, Table, percent
from sqft.strict import parse_json

COLUMNS = (
    Column("model", "model"), Column("runtime", "runtime"), Column("size", "bytes", human),
    Column("perplexity", "perplexity", "{:.2f}".format), Column("loads in", "load_seconds", "{:.1f} s".format),
    Column("peak memory", "peak_bytes", human), Column("batch", "batch"), Column("prompt", "prompt"),
    Column("prefill, tokens/s", "prefill_per_second", "{:.0f}".format),
    Column("decode, tokens/s", "decode_per_second", "{:.1f}".format),
    Column("share of bandwidth", "share_of_bandwidth", percent),
    Column("joules a token", "joules_per_token", "{:.3f}".format),
    Column("CPU seconds a token", "cpu_seconds_per_token", "{:.4f}".format), Column("", "error"),
)  # fmt: skip


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    lines = [row | case for row in rows for case in row.get("cases") or [{}]]
    shown = [column for column in COLUMNS if any(column.key in line for line in lines)]
    return Table(shown, lines)


def part(section: Section) -> tuple[Table, list[Figure]]:
    """Of the ``bench.json`` files in a section's folder: the table, and tokens a second over size."""
    rows = []
    for file in sorted(section.root.rglob("bench.json")):
        found = section.read(file, partial(parse_json, data=True), {}).get("rows")
        rows += [_clean(row) for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    runtimes = list(dict.fromkeys(str(row.get("runtime")) for row in rows))
    marks = []
    for row in rows:
        cases = [case for case in row["cases"] if case.get("batch") == 1 and "decode_per_second" in case]
        if cases and "bytes" in row:
            size, speed, runtime = row["bytes"] / 1e6, cases[0]["decode_per_second"], str(row["runtime"])
            tip = f"{row['model']} in {runtime}: {speed:.1f} tokens/s, {human(row['bytes'])}"
            marks.append(Series([(size, speed)], runtimes.index(runtime), "dot", tip, str(row["model"]), runtime))
    chart = Chart("tokens a second over size", "size, MB", "decoded tokens a second, batch 1", marks)
    figure = Figure("", chart, "Up and to the left is better. One process a mark, all in one run.", True)
    return table_of(rows), [figure] if len(marks) > 1 else []


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    """What is as ``bench`` writes it: a file may be damaged, or of another tool."""
    cases = row.get("cases")
    cases = [numbers(case) for case in cases] if isinstance(cases, list) else []
    texts = {key: str(row[key]) for key in ("model", "runtime", "error") if key in row}
    return {"model": "?", "runtime": "?", **numbers(row), **texts, "cases": cases}
