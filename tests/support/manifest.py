"""Changes a stage folder's manifest as sqft itself would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqft.keys import sealed_text


def edit(folder: Path, **values: Any) -> None:
    file = folder / "sqft.json"
    file.write_text(sealed_text({**json.loads(file.read_text()), **values}))
