"""``make sbom``: what is installed beside sqft, as CycloneDX JSON; the same environment gives the same bytes."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any


def component(found: Distribution) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    licence = found.metadata.get("License-Expression") or ""
    return {
        "type": "library", "name": name, "version": found.version, "purl": f"pkg:pypi/{name}@{found.version}",
        **({"licenses": [{"expression": licence}]} if licence else {}),
    }  # fmt: skip


def sbom() -> dict[str, Any]:
    components = {each["purl"]: each for each in map(component, distributions())}
    own = next(each for each in components.values() if each["name"] == "sqft")
    others = [components[purl] for purl in sorted(components) if purl != own["purl"]]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
            "metadata": {"component": {**own, "type": "application"}}, "components": others}  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(sbom(), indent=1) + "\n", encoding="utf-8")
