"""A sparsify or quantize that was killed goes on after the last finished block, to the same bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pico import pico_folder

import sqft
from sqft.compressing.passes import Prune, Quantize
from sqft.models.discover import Block

SIZES = {"samples": 6, "length": 24, "batch_size": 2}
GPTQ = {"group_size": 32, **SIZES}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {  # of sparsify, of quantize
    "wanda": ({}, None),
    "repaired": ({"repair": "layer"}, None),
    "sparsegpt": ({"method": "sparsegpt", "pattern": "2:4"}, None),
    "gptq": (None, {"keep_fractions": True}),
    "act-order": (None, {"act_order": True, "true_sequential": False}),
    "gptaq": (None, {"method": "gptaq", "bits": 8, "symmetric": True}),
    "both": ({"repair": "layer"}, {"repair": "layer"}),
}


class Killed(Exception):
    """What ends a stage in the middle."""


def run(case: str, source: Path, out: Path) -> dict[str, Any]:
    first, then = CASES[case]
    pruning = None if first is None else sqft.SparsifyConfig(**SIZES, **first)
    if then is None:
        return sqft.sparsify(source, pruning, out=out)
    return sqft.quantize(source, sqft.QuantizeConfig(**GPTQ, **then), first=pruning, out=out)


WITH_EXPERTS = [case for case in CASES if case not in ("repaired", "gptaq", "both")]  # these are refused


@pytest.mark.parametrize(("case", "family"), [*itertools.product(CASES, ("llama", "gpt2")),
                                              *itertools.product(WITH_EXPERTS, ["qwen3_moe"])])  # fmt: skip
def test_goes_on_after_the_last_finished_block(
    case: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pico_folder(tmp_path / "m", family)
    whole = run(case, source, tmp_path / "whole")
    changed: list[tuple[str, str]] = []
    stop = True
    for kind in (Prune, Quantize):
        usual = kind.change

        def change(self: Any, block: Block, statistics: Any, usual: Any = usual) -> None:
            if stop and block.name.endswith(".1"):
                raise Killed
            changed.append((self.stage, block.name))
            usual(self, block, statistics)

        monkeypatch.setattr(kind, "change", change)
    with pytest.raises(Killed):
        run(case, source, tmp_path / "killed")
    assert not (tmp_path / "killed").exists() and len(list(tmp_path.glob(".killed.compressing-*"))) == 1
    stop, begun = False, set(changed)
    changed.clear()
    again = run(case, source, tmp_path / "killed")
    assert begun and changed and not begun & set(changed)  # the first block was not changed again
    one, other = (sqft.artifact.read_manifest(tmp_path / name) for name in ("whole", "killed"))
    assert one.files == other.files and one.key == other.key
    timeless = lambda metrics: {key: value for key, value in metrics.items() if key not in ("seconds", "peak_bytes")}  # noqa: E731
    assert timeless(whole) == timeless(again)
    assert not list(tmp_path.glob(".*"))


def test_a_block_that_is_damaged_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pico_folder(tmp_path / "m")
    run("repaired", source, tmp_path / "whole")
    usual = Prune.change

    def killing(self: Any, block: Block, statistics: Any) -> None:
        if block.name.endswith(".1"):
            raise Killed
        usual(self, block, statistics)

    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(Prune, "change", killing)
        run("repaired", source, tmp_path / "out")
    (file,) = tmp_path.glob(".out.compressing-*/sparsify/*/block.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run("repaired", source, tmp_path / "out")
    assert sqft.artifact.read_manifest(tmp_path / "out").files == sqft.artifact.read_manifest(tmp_path / "whole").files
