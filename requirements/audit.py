"""``make audit``: known vulnerabilities of what CI installs; where nothing can be looked up, that, and exit code 0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).with_name("ci.txt")


def told(report: str) -> tuple[str, int]:
    """What pip-audit's JSON comes to, as a sentence, and the exit code."""
    try:
        found = json.loads(report)["dependencies"]
    except ValueError:
        found = []
    looked = [each for each in found if "skip_reason" not in each]
    bad = [f"{each['name']} {each['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none'}"
           for each in looked for hole in each["vulns"]]  # fmt: skip
    if not looked:
        return "audit: no data on vulnerabilities can be reached from here: nothing was checked", 0
    skipped = f", {len(found) - len(looked)} more could not be looked up" * (len(found) > len(looked))
    return "\n".join([*bad, f"audit: {len(bad)} known vulnerabilities in {len(looked)} packages{skipped}"]), int(
        bool(bad)
    )


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-f", "json", "-r", str(LOCK)]
    text, code = told(subprocess.run(command, capture_output=True, text=True).stdout)
    print(text)
    sys.exit(code)
