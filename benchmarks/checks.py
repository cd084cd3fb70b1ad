"""Prints the checks of all results: every number that is promised, its limit, and whether it holds."""

from __future__ import annotations

import json
import sys

from common import RESULTS
from rich.console import Console
from rich.table import Table


def main() -> int:
    table = Table("benchmark", "check", "value", "limit", "holds")
    failed = 0
    for file in sorted(RESULTS.glob("*.json")):
        for entry in json.loads(file.read_text())["checks"]:
            failed += not entry["holds"]
            holds = "yes" if entry["holds"] else "NO"
            table.add_row(file.stem, entry["name"], f"{entry['value']:.4g}", f"{entry['limit']:.4g}", holds)
    Console(width=160).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
