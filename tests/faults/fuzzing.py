"""Files that a stranger could have written, changed at random, for everything in sqft that reads one.

    python tests/faults/fuzzing.py INPUTS RESULT.json [SECONDS [SEED]]

A good end is a result, or a ``SqftError`` of one line, within 5 seconds and 500 MB, and nothing written outside of the
case's folder. Input ``n`` of a seed is always the same: ``fuzz(target, n)``.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from mutating import NUMBERS, PARTS, TEMPLATES, TEXTS, VALUES, bytes_of, tensors_of, value_of
from safetensors.torch import save
from world import Tally, World, quietly

from sqft import artifact
from sqft.flags import read_flags
from sqft.folders import load
from sqft.formats.compact import CompactReader, coder_of
from sqft.formats.compressed_tensors import COMPRESSED_TENSORS
from sqft.formats.gptq import GPTQ
from sqft.formats.settings import Settings
from sqft.keys import sealed_text
from sqft.models.bounds import check_adapter
from sqft.models.dense import skeleton
from sqft.models.reader import SafetensorsReader
from sqft.options import from_dict
from sqft.recipe import load_recipe, steps
from sqft.reporting.page import report
from sqft.sparsity.masks import attach_masks, load_masks
from sqft.stages import STAGES
from sqft.strict import read_yaml
from sqft.tasks.lookup import get_task
from sqft.tasks.spec import load_spec


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
