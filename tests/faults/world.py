"""What the fuzzers' cases are made from, how one runs, and what is counted of all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf import GGUFReader
from pico import pico_folder, pico_model

import sqft
from sqft import cli
from sqft.config import TrainConfig
from sqft.errors import SqftError
from sqft.folders import load
from sqft.formats.checkpoint import quantization_config
from sqft.models.reader import SafetensorsReader
from sqft.quantization.linear import QuantLinear
from sqft.recipe import shipped_recipes
from sqft.sparsity.masks import load_masks
from sqft.tasks.spec import shipped_file, shipped_specs

SECONDS, BYTES = 5.0, 500 * 2**20


class Hung(BaseException):
    """A case took too long."""


@dataclass
class World:
    """What cases are made from, once; ``at``: the folder of a case, ``outside``: what it must not touch."""

    root: Path

    refused: int = 0

    def __post_init__(self) -> None:
        self.at, self.outside = self.root / "case", self.root / "outside"
        self.outside.mkdir()
        (self.outside / "kept").write_text("kept")
        self.dense = pico_folder(self.root / "dense")
        sqft.sparsify(self.dense, sqft.SparsifyConfig(method="magnitude"), out=self.root / "sparse")
        packed = sqft.QuantizeConfig(method="rtn", group_size=32)
        sqft.quantize(self.root / "sparse", packed, out=self.root / "int4")
        sqft.pack(self.root / "int4", out=self.root / "compact")
        sqft.train(self.root / "sparse", TrainConfig(adapter="sparse-peft", max_steps=1, r=4, batch_size=2),
                   [sqft.Example("1+1=", "2", "2")] * 4, out=self.root / "adapter")  # fmt: skip
        self.model = pico_model()
        live, _ = load(self.root / "int4")
        self.layer = next(module for module in live.modules() if isinstance(module, QuantLinear))
        sqft.export(self.root / "dense", sqft.ExportConfig(to="gguf"), out=self.root / "gguf")
        self.gguf = (file := self.root / "gguf" / "model.gguf").read_bytes()
        self.gguf_header = min(int(t.data_offset) for t in GGUFReader(file).tensors)
        self.settings = {name: quantization_config(live, {"model.layers.0.mlp.up_proj": self.layer}, name)
                         for name in ("gptq", "compressed-tensors")}  # fmt: skip
        self.parser = cli.build_parser()
        self.texts = {name: self._text(name) for name in ("sparse", "adapter")}
        files = {name: self.root / folder / file for name, (folder, file) in {
            "model": ("dense", "model.safetensors"), "masks": ("sparse", "masks/masks.safetensors"),
            "compact": ("compact", "model.safetensors"), "adapter": ("adapter", "adapter_model.safetensors")}.items()}  # fmt: skip
        self.files = {name: file.read_bytes() for name, file in files.items()}
        self.compact = dict(SafetensorsReader(self.root / "compact"))
        self.masks = load_masks(self.root / "sparse")
        self.shipped = [self._shipped("sqft/recipes", name) for name in shipped_recipes()]
        self.specs = [shipped_file(name).read_text() for name in shipped_specs()]
        self.data = self.root / "data"
        self.data.mkdir()
        (self.data / "test.jsonl").write_text('{"q": "' + "a" * 30 + '!", "a": "1"}\n' * 2)

    def _text(self, folder: str) -> dict[str, Any]:
        return json.loads((self.root / folder / "sqft.json").read_text())

    def _shipped(self, folder: str, name: str) -> str:
        return (Path(sqft.__file__).parents[1] / folder / f"{name}.yaml").read_text()

    def copy(self, name: str) -> Path:
        """A folder of links to another's files, which a case may replace."""
        made = self.at / name
        shutil.copytree(self.root / name, made, copy_function=os.link)
        return made

    def put(self, path: Path, data: bytes | str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        return path


def attempt(world: World, target: Callable[[World, random.Random], Any], rng: random.Random) -> str:
    """What is wrong with how one input ended; nothing if it is as it should be."""
    shutil.rmtree(world.at, ignore_errors=True)
    world.at.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)  # of a machine that does other things too
    started = time.process_time()
    try:
        target(world, rng)
        problem = ""
    except SqftError as error:
        text = str(error)
        world.refused += 1
        problem = (
            "" if text and "\n" not in text and len(text) <= 2500 else f"its message is not one line: {text[:500]!r}"
        )
    except Hung:
        problem = "it hung"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.process_time() - started > SECONDS:
        problem = problem or f"it took {time.process_time() - started:.1f} s"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > BYTES:
        problem = problem or "it took more than 500 MB"
    outside = [path.name for path in world.outside.iterdir()]
    if outside != ["kept"] or (world.outside / "kept").read_text() != "kept" or os.listdir(world.root / "here"):
        problem = problem or "it wrote outside of its folder"
    return problem


@contextlib.contextmanager
def quietly(root: Path) -> Iterator[World]:
    """A world, in a folder of which nothing else may be written, with a clock that stops what hangs."""
    import logging

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def hung(*_: Any) -> None:
        raise Hung

    home, before = os.getcwd(), signal.signal(signal.SIGALRM, hung)
    try:
        world = World(root)
        (root / "here").mkdir()
        os.chdir(root / "here")
        yield world
    finally:
        os.chdir(home)
        signal.signal(signal.SIGALRM, before)
        logging.disable(logging.NOTSET)


class Tally:
    """Counts by target, and what went wrong."""

    def __init__(self, world: World, **about: Any) -> None:
        self.world, self._began = world, time.monotonic()
        self.found: dict[str, Any] = {"inputs": 0, "refused": 0, **about, "by_target": Counter(),
                                      "seconds_by_target": Counter(), "wrong": []}  # fmt: skip

    def add(self, target: Callable[[World, random.Random], Any], rng: random.Random, name: Any) -> None:
        started = time.monotonic()
        problem = attempt(self.world, target, rng)
        self.found["inputs"], self.found["refused"] = self.found["inputs"] + 1, self.world.refused
        self.found["by_target"][target.__name__] += 1
        self.found["seconds_by_target"][target.__name__] += time.monotonic() - started
        self.found["took_seconds"] = round(time.monotonic() - self._began, 1)
        if problem:
            self.found["wrong"].append(f"{target.__name__} {name}: {problem}")

    def write(self, file: Path) -> None:
        seconds = {name: round(value, 1) for name, value in self.found["seconds_by_target"].items()}
        file.write_text(json.dumps({**self.found, "seconds_by_target": seconds}, indent=1) + "\n")
