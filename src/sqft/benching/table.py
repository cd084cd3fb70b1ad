"""The rows of ``bench`` as a table: a line for each model, runtime and case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqft.measuring.size import human
from sqft.reporting.tables import Column, Table, percent

COLUMNS = (
    Column("model", "model"), Column("runtime", "runtime"), Column("size", "bytes", human),
    Column("loads in", "load_seconds", lambda value: f"{value:.1f} s"), Column("peak memory", "peak_bytes", human),
    Column("batch", "batch"), Column("prompt", "prompt"),
    Column("prefill, tokens/s", "prefill_per_second", lambda value: f"{value:.0f}"),
    Column("decode, tokens/s", "decode_per_second", lambda value: f"{value:.1f}"),
    Column("share of bandwidth", "share_of_bandwidth", percent),
    Column("CPU seconds a token", "cpu_seconds_per_token", lambda value: f"{value:.4f}"), Column("", "error"),
)  # fmt: skip


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    lines = [row | case for row in rows for case in row.get("cases") or [{}]]
    shown = [column for column in COLUMNS if any(column.key in line for line in lines)]
    return Table(shown, lines)
