"""``sqft.export``: a model folder as another tool wants it, verified before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sqft import artifact
from sqft.deployment import ExportConfig
from sqft.errors import SqftError, UsageError
from sqft.formats.compact import is_compact
from sqft.models.reader import Reader, SafetensorsReader
from sqft.registry import EXPORTERS


class Exporter(Protocol):
    """One target. Registered (``registry.EXPORTERS``) by its name; it is made without arguments."""

    def check(self, reader: Reader) -> Sequence[str]:
        """What will be lost, a sentence each, which needs ``allow_lossy``. Raises SqftError, before any work, for a
        model that the target cannot hold."""
        ...

    def write(self, reader: Reader, out: Path) -> None:
        """Writes into the empty folder ``out``, tensor by tensor."""
        ...

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        """Reads what was written and compares it with the source. Returns metrics; raises VerificationError."""
        ...


def export(folder: str | Path, config: ExportConfig | None = None, *, out: str | Path,
           overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes a model folder (not an adapter's) as another tool wants it; what fails its check is not written.

    Returns the metrics. Raises UsageError for an unknown exporter or an output that holds something, SqftError for a
    folder that cannot be read or exported, VerificationError if what was written is not the model.
    """
    config = config or ExportConfig()
    target: Exporter = EXPORTERS[config.to]()
    with artifact.stage("export", config, out, folder, overwrite=overwrite) as made:
        if not Path(folder).is_dir():
            raise UsageError(f"{folder} is not a folder: only a model on this disk is exported")
        if (Path(folder) / "adapter_config.json").is_file():
            raise SqftError(f"{folder} is an adapter: merge it first (sqft merge), and export the merged model")
        if is_compact(folder):
            raise SqftError(f"{folder} is compact, which only sqft reads: unpack it first (sqft unpack)")
        reader = SafetensorsReader(folder)
        if any(".experts." in name and name.endswith(("qweight", "weight_packed")) for name in reader.layout):
            raise SqftError(f"{folder} has experts in INT, gate and up as one, which no other tool reads yet: export "
                            "the float model, or serve it with sqft")  # fmt: skip
        lost = target.check(reader)
        if lost and not config.allow_lossy:
            raise SqftError(
                f"an export to {config.to} would not be exact: {'; '.join(lost)}. Accept that by --allow-lossy"
            )
        made.metrics["exact"] = not lost
        target.write(reader, made.folder)
        made.metrics.update(target.verify(reader, made.folder))
    return made.metrics
