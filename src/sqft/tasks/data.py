"""A split's records, from a local folder or from the hub: never from the one when the other was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.calibration.data import read_records
from sqft.errors import SqftError, UsageError

_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?[0-9]*):(-?[0-9]*)\])?")
FILES = (".jsonl", ".jsonl.gz", ".json")


@dataclass(frozen=True)
class Source:
    """Where a task's records are: ``hub`` ('name' or 'name:config'), or ``folder`` below a data_dir. ``files`` maps a
    split to its file's stem, where that has another name."""

    task: str
    hub: str | None
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)

    def read(self, split: str, data_dir: str | Path | None) -> list[dict[str, Any]]:
        """The records of 'train', or of a slice of it as in 'train[:-500]'.

        A local split is FOLDER/SPLIT.jsonl, .jsonl.gz, or .json (a list). Raises UsageError naming the file that is
        missing, SqftError for one that is corrupt and for a hub that does not answer.
        """
        match = _SPLIT.fullmatch(split)
        if not match:
            raise UsageError(f"task {self.task}: '{split}' is no split: write e.g. train or 'train[:-500]'")
        stem, start, stop = match.groups()
        records = self._local(stem, Path(data_dir)) if data_dir is not None else self._hub(stem)
        if start is None:
            return records
        return records[int(start) if start else None : int(stop) if stop else None]

    def _local(self, stem: str, data_dir: Path) -> list[dict[str, Any]]:
        if not data_dir.is_dir():
            raise UsageError(f"there is no folder {data_dir} (data_dir)")
        folder, stem = data_dir / self.folder, self.files.get(stem, stem)
        for suffix in FILES:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return _json_list(path) if suffix == ".json" else read_records(str(path))
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        has = f"{folder} has {', '.join(there)}" if there else f"there is no folder {folder}"
        raise UsageError(f"task {self.task} needs {folder / stem}.jsonl (or .jsonl.gz, .json), but {has}")

    def _hub(self, stem: str) -> list[dict[str, Any]]:
        if self.hub is None:
            raise UsageError(f"the data of task {self.task} is on no hub: give data_dir, a folder with "
                             f"{self.folder}/{stem}.jsonl")  # fmt: skip
        try:
            return read_records(f"{self.hub}@{stem}")
        except SqftError as error:
            raise SqftError(f"task {self.task}: {error}; or give data_dir, a folder with {self.folder}/{stem}.jsonl "
                            "(--data-dir)") from error  # fmt: skip


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SqftError(f"cannot read {path}: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or not records:
        raise SqftError(f"{path} is not a list of JSON objects")
    return records
