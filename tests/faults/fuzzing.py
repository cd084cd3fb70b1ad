"""Files that a stranger could have written, changed at random, for everything in sqft that reads one.

    python tests/faults/fuzzing.py INPUTS RESULT.json [SECONDS [SEED]]

A good end is a result, or a ``SqftError`` of one line, within 5 seconds and 500 MB, and nothing written outside of the
case's folder. Input ``n`` of a seed is always the same: ``fuzz(target, n)``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from gguf import GGUFReader
from mutating import NUMBERS, PARTS, TEMPLATES, TEXTS, VALUES, bytes_of, tensors_of, value_of
from pico import pico_folder, pico_model
from safetensors.torch import save

import sqft
from sqft import artifact, cli
from sqft.config import TrainConfig
from sqft.errors import SqftError
from sqft.flags import read_flags
from sqft.folders import load
from sqft.formats.checkpoint import quantization_config
from sqft.formats.compact import CompactReader, coder_of
from sqft.formats.compressed_tensors import COMPRESSED_TENSORS
from sqft.formats.gptq import GPTQ
from sqft.formats.settings import Settings
from sqft.keys import sealed_text
from sqft.models.bounds import check_adapter
from sqft.models.dense import skeleton
from sqft.models.reader import SafetensorsReader
from sqft.options import from_dict
from sqft.quantization.linear import QuantLinear
from sqft.recipe import load_recipe, shipped_recipes, steps
from sqft.reporting.page import report
from sqft.sparsity.masks import attach_masks, load_masks
from sqft.stages import STAGES
from sqft.strict import read_yaml
from sqft.tasks.lookup import get_task
from sqft.tasks.spec import load_spec, shipped_file, shipped_specs

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


def yaml_text(rng: random.Random, text: str) -> bytes | str:
    if rng.random() < 0.6:
        return bytes_of(rng, text.encode())
    return yaml.safe_dump(value_of(rng, yaml.safe_load(text)), allow_unicode=rng.random() < 0.5)


def json_text(rng: random.Random, value: Any) -> bytes | str:
    if rng.random() < 0.4:
        return bytes_of(rng, json.dumps(value, indent=rng.choice([None, 1])).encode())
    return json.dumps(value_of(rng, value))


def recipe(world: World, rng: random.Random) -> Any:
    steps(load_recipe(world.put(world.at / "recipe.yaml", yaml_text(rng, rng.choice(world.shipped)))))


def ranks(world: World, rng: random.Random) -> Any:
    read_yaml(world.put(world.at / "ranks.yaml", yaml_text(rng, "a.q_proj: 4\na.v_proj: 8\nb: 2\n")))


def options(world: World, rng: random.Random) -> Any:
    stage = STAGES[rng.choice(sorted(STAGES))]
    names = [*stage.config.__dataclass_fields__, "x"]
    given = {rng.choice(names): rng.choice([*VALUES, 4, 0.5, "cpu", "1,2", ["a", 2]]) for _ in range(rng.randint(1, 4))}
    from_dict(stage.config, given)


def command_line(world: World, rng: random.Random) -> Any:
    name = rng.choice(sorted(set(STAGES) - {"export"}))
    flags = [f"--{field.replace('_', '-')}" for field in STAGES[name].config.__dataclass_fields__]
    words = [rng.choice([*flags, *flags, *NUMBERS, *TEXTS, "a=1", "0.5"]) for _ in range(rng.randint(1, 8))]
    given, unknown = world.parser.parse_known_args(
        [name, "model", "out", *(w for w in words if w not in ("-h", "--help"))]
    )
    if not unknown:
        read_flags(given, STAGES[name].config)


def manifest(world: World, rng: random.Random) -> Any:
    values = world.texts[rng.choice(sorted(world.texts))]
    text = json_text(rng, values)
    if rng.random() < 0.7:  # one who knows how it is sealed
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            text = sealed_text(value_of(rng, values))
    world.put(world.at / "sqft.json", text)
    artifact.check_files(world.at)


def overwrite(world: World, rng: random.Random) -> Any:
    out = world.at / "out"
    out.mkdir()
    values = {**world.texts["sparse"], "files": {rng.choice(["../../outside/kept", str(world.outside / "kept"), "a", "a/b"]):
              {"bytes": 4, "sha256": "0" * 64}}}  # fmt: skip
    values = value_of(rng, values) if rng.random() < 0.5 else values
    with contextlib.suppress(UnicodeEncodeError):  # half of a character
        world.put(out / "sqft.json", sealed_text(values))
    if rng.random() < 0.5:
        (out / rng.choice(["a", "model.safetensors", "link"])).symlink_to(world.outside)
    with artifact.stage("save", None, out, overwrite=True) as made:
        (made.folder / "b").write_text("new")


def task(world: World, rng: random.Random) -> Any:
    load_spec(world.put(world.at / "t.yaml", yaml_text(rng, rng.choice(world.specs))), world.data)


def jinja(world: World, rng: random.Random) -> Any:
    text = rng.choice(TEMPLATES) % rng.choice(PARTS)
    text = bytes_of(rng, text.encode()).decode("utf-8", "replace") if rng.random() < 0.3 else text
    spec = {
        "folder": ".x",
        "splits": {"test": "test"},
        "prompt": text,
        "answer": rng.choice(["a", "q", "1", text.strip("{} ")]),
    }
    world.put(world.at / ".x" / "test.jsonl", (world.data / "test.jsonl").read_bytes())
    load_spec(world.put(world.at / "t.yaml", yaml.safe_dump(spec)), world.at).examples("test", 2)


def records(world: World, rng: random.Random) -> Any:
    line = {"question_stem": "Hot is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    text = b"\n".join(text.encode("utf-8", "surrogatepass") if isinstance(text := json_text(rng, line), str) else text
                      for _ in range(2))  # fmt: skip
    spec = get_task("openbookqa", world.at)
    stem = spec.splits["test"].split("[")[0]
    world.put(world.at / spec.folder / f"{spec.files.get(stem, stem)}.jsonl", text)
    found = spec.records(spec.splits["test"])
    if rng.random() < 0.1:
        assert found and spec.examples("test")


def config(world: World, rng: random.Random) -> Any:
    folder = world.at / "m"
    values = json.loads((world.dense / "config.json").read_text())
    world.put(folder / "config.json", json_text(rng, values))
    skeleton(folder)


def whole_model(world: World, rng: random.Random) -> Any:
    folder = world.copy(rng.choice(["dense", "sparse", "int4", "compact"]))
    (folder / "sqft.json").unlink(missing_ok=True)
    file = rng.choice(sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors")))
    if file.suffix == ".json":
        world.put(file, json_text(rng, json.loads(file.read_text())))
    else:
        world.put(file, save(tensors_of(rng, dict(SafetensorsReader(file))), {"format": "pt"}))
    load(folder)


def headers(world: World, rng: random.Random) -> Any:
    data = world.files[rng.choice(sorted(world.files))]
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = json_text(rng, json.loads(data[8 : 8 + length]))
        header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = bytes_of(rng, data)
    file = world.put(world.at / "model.safetensors", data)
    for _, tensor in SafetensorsReader(file):
        tensor.sum() if tensor.numel() and not tensor.is_complex() and tensor.element_size() > 1 else None


def gguf(world: World, rng: random.Random) -> Any:
    data = world.gguf
    if rng.random() < 0.7:  # a number of the header
        kind, at = rng.choice("IQ"), rng.randrange(4, world.gguf_header)
        number = rng.choice([0, 1, 2, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, rng.randrange(2**16)])
        changed = struct.pack(f"<{kind}", number % (2**32 if kind == "I" else 2**64))
        data = data[:at] + changed + data[at + len(changed) :]
    else:
        data = bytes_of(rng, data[: world.gguf_header]) + data[world.gguf_header :]
    skeleton(world.put(world.at / "model.gguf", data))


def masks(world: World, rng: random.Random) -> Any:
    file = world.at / "masks" / "masks.safetensors"
    world.put(file, save(tensors_of(rng, world.masks)) if rng.random() < 0.8 else bytes_of(rng, world.files["masks"]))
    attach_masks(world.model, load_masks(world.at))


def packed(world: World, rng: random.Random) -> Any:
    coder, name = rng.choice([(GPTQ, "gptq"), (COMPRESSED_TENSORS, "compressed-tensors")])
    read = coder_of({"quantization_config": value_of(rng, world.settings[name])}) if rng.random() < 0.5 else None
    settings = read[1] if read else Settings(rng.choice([2, 3, 4, 8]), rng.choice([32, -1, 0, 7, 16]), rng.random() < 0.5,
                                             coder.versions[0])  # fmt: skip
    tensors = tensors_of(rng, {**coder.encode(world.layer, coder.versions[0]), "g_idx": world.layer.g_idx})
    coder.decode("m", tensors, settings).dequantize()


def compact(world: World, rng: random.Random) -> Any:
    folder = world.copy("compact")
    (folder / "sqft.json").unlink()
    if rng.random() < 0.8:
        world.put(folder / "model.safetensors", save(tensors_of(rng, world.compact)))
    else:
        world.put(folder / "config.json", json_text(rng, json.loads((folder / "config.json").read_text())))
    reader = CompactReader(folder)
    for module in reader.modules:
        reader.compact(module)
        reader.layer(module) if reader.bits else reader.get(f"{module}.weight")


def adapter(world: World, rng: random.Random) -> Any:
    folder = world.copy("adapter")
    (folder / "sqft.json").unlink()
    file = folder / "adapter_config.json"
    world.put(
        file, json_text(rng, {**json.loads(file.read_text()), "base_model_name_or_path": str(world.root / "sparse")})
    )
    check_adapter(folder)
    if rng.random() < 0.1:
        load(folder)


def page(world: World, rng: random.Random) -> Any:
    for name in ("sparse", "adapter"):
        with contextlib.suppress(UnicodeEncodeError):  # half of a character
            world.put(world.at / name / "sqft.json", sealed_text(value_of(rng, world.texts[name])))
    report([world.at])


# How often each is drawn: those that build models or start processes are slow.
TARGETS: dict[Callable[[World, random.Random], Any], int] = {
    recipe: 25, ranks: 100, options: 200, command_line: 120, manifest: 150, overwrite: 8, task: 40, jinja: 6, records: 100,
    config: 8, whole_model: 2, headers: 140, gguf: 20, masks: 60, packed: 140, compact: 4, adapter: 15, page: 1,
}  # fmt: skip


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


def fuzz(inputs: int, seconds: float = 1e9, seed: int = 0, file: Path | None = None) -> dict[str, Any]:
    """Runs so many inputs, or as many as the seconds allow: what ``Tally`` counts."""
    targets, weights = list(TARGETS), list(TARGETS.values())
    with tempfile.TemporaryDirectory() as work, quietly(Path(work)) as world:
        tally = Tally(world, seed=seed)
        for number in range(inputs):
            (target,) = random.Random(f"{seed} target {number}").choices(targets, weights)
            tally.add(target, random.Random(f"{seed} {number}"), number)
            if tally.found["took_seconds"] > seconds or len(tally.found["wrong"]) > 1000:
                break
            if number % 1000 == 0 and file is not None:
                tally.write(file)
        if file is not None:
            tally.write(file)
    return tally.found


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [float(value) for value in sys.argv[3:]]
    fuzz(int(sys.argv[1]), *numbers[:1], *map(int, numbers[1:]), file=Path(sys.argv[2]).absolute())
