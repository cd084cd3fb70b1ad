"""Changes single bytes, and cuts, each file of each stage, and asks who notices: the next stage, ``sqft.load`` and a recipe's skip.

python tests/faults/flipping.py FLIPS RESULT.json
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def make(root: Path) -> dict[str, Callable[[Path], Any]]:
    """Every stage's folder below ``root``, and what reads it next, given an output."""
    import torch
    from pico import pico_folder

    import sqft

    torch.set_num_threads(1)
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    examples = [sqft.Example(f"{i}+{i}=", str(2 * i), str(2 * i)) for i in range(16)]
    config = sqft.TrainConfig(
        adapter="qa-sparse-peft", max_steps=2, save_steps=1, batch_size=4, r=4, search_space=[4, 2]
    )
    search = sqft.SearchConfig(task="arithmetic", limit=2, metric="loss", evaluations=2)
    scores = sqft.EvaluateConfig(text="builtin", length=32, max_tokens=64)
    pico_folder(root / "dense")
    sqft.sparsify(root / "dense", sqft.SparsifyConfig(), tokens, out=root / "sparsify")
    sqft.quantize(root / "sparsify", sqft.QuantizeConfig(group_size=32), tokens, out=root / "quantize")
    sqft.train(root / "quantize", config, examples, out=root / "train")
    sqft.search(root / "train", search, out=root / "search")
    sqft.merge(root / "search", out=root / "merge")
    sqft.pack(root / "merge", out=root / "pack")
    sqft.evaluate(root / "merge", scores, out=root / "evaluate")
    return {
        "sparsify": lambda out: sqft.quantize(root / "sparsify", sqft.QuantizeConfig(method="rtn"), out=out),
        "quantize": lambda out: sqft.train(root / "quantize", config, examples, out=out),
        "train": lambda out: sqft.search(root / "train", search, out=out),
        "search": lambda out: sqft.merge(root / "search", out=out),
        "merge": lambda out: sqft.evaluate(root / "merge", scores, out=out),
        "pack": lambda out: sqft.unpack(root / "pack", out=out),
        "evaluate": lambda out: sqft.artifact.check_files(root / "evaluate"),  # nothing reads it but a recipe's skip
    }


def places(name: str, data: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, int]]:
    """(class, position) of bytes to change: of safetensors length, header, padding and data; of JSON and text every kind
    of character."""
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        text = len(header.rstrip(b" "))
        parts = {"length": range(8), "header": range(8, 8 + text), "padding": range(8 + text, 8 + length),
                 "data": range(8 + length, len(data))}  # fmt: skip
    else:
        kinds = {"digit": b"0123456789", "mark": b'{}[],:"', "space": b" \n\t"}
        parts = {kind: [i for i, byte in enumerate(data) if byte in of] for kind, of in kinds.items()}
        parts["other"] = [i for i, byte in enumerate(data) if not any(byte in of for of in kinds.values())]
    for kind, positions in parts.items():
        for _ in range(count if positions else 0):
            yield f"{Path(name).suffix.removeprefix('.')} {kind}", rng.choice(positions)


def damages(name: str, data: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    for kind, at in places(name, data, rng, count):
        yield kind, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    for size in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(count))}:
        yield f"{Path(name).suffix.removeprefix('.')} cut", data[:size]


def main(flips: int, result: Path) -> None:
    sys.path.insert(0, str(TESTS))
    import sqft
    from sqft.recipe import finished

    found: dict[str, Any] = {"flips": 0, "noticed": 0, "unnoticed": [], "by_class": Counter(), "by_stage": Counter()}
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        readers = make(root)
        keys = {stage: sqft.artifact.read_manifest(root / stage).key for stage in readers}
        files = [(stage, file) for stage in readers for file in sorted((root / stage).rglob("*"))
                 if file.is_file() and file.suffix != ".md"]  # fmt: skip
        found["files"] = len(files)
        count = max(1, round(flips / len(files) / 5))
        for stage, file in files:
            name, data = file.relative_to(root).as_posix(), file.read_bytes()
            for kind, damaged in damages(name, data, rng, count):
                file.write_bytes(damaged)
                os.utime(file, ns=(0, found["flips"]))
                unseen = noticed(readers[stage], root, stage, keys[stage], finished)
                found["flips"] += 1
                found["noticed"] += not unseen
                found["by_class"][kind] += 1
                found["by_stage"][stage] += 1
                found["unnoticed"] += [f"{name} ({kind}): by {who}" for who in unseen]
            file.write_bytes(data)
        result.write_text(json.dumps(found, indent=1) + "\n")


def noticed(reader: Callable[[Path], Any], root: Path, stage: str, key: str, finished: Any) -> list[str]:
    """Who does not notice that a stage's folder is damaged."""
    import sqft

    unseen, said = [], []
    for who, read in (
        ("the next stage", lambda: reader(root / "next")),
        ("sqft.load", lambda: sqft.load(root / stage)),
    ):
        try:
            if stage != "evaluate" or who == "the next stage":
                read()
                unseen.append(who)
        except sqft.SqftError:
            pass
    if finished(root / stage, key, said.append) is not None or not said:
        unseen.append("a skip")
    return unseen


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
