"""Every stage's artefacts on three pico families, as fingerprints: what the move to the second plan must not change.

``python tests/support/artefacts.py OUT.json`` writes them; ``tests/invariants/test_same_artefacts.py`` compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pico import pico_folder
from safetensors.torch import load_file

import sqft

FAMILIES = ("llama", "phi3", "opt")  # tied, fused, biased
TOKENS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
EXAMPLES = [sqft.Example(f"Q: {i} plus {i}?\nA:", f" {2 * i}", str(2 * i)) for i in range(40)]
NUMBERS = ("sparsity", "zeros", "weights", "pruned", "filled", "zeros_kept", "parameters", "bits", "bits_per_weight",
           "loss", "eval_loss", "steps", "trainable_parameters", "max_logit_difference", "perplexity", "score", "cost",
           "ranks", "integers_compared", "correct")  # fmt: skip


BEFORE = {"min_zero": 0, "scale_bits": 11, "embeddings": "keep"}  # the defaults of then


def processor() -> str:
    """Where float results are the same bit for bit: processors of one kind, with one torch."""
    vendor = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        vendor = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "vendor_id" in line), vendor
        )
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def training(kind: str, **options: Any) -> sqft.TrainConfig:
    name = "adapter" if "adapter" in sqft.TrainConfig.__dataclass_fields__ else "pipeline"  # its name before the move
    return sqft.TrainConfig(
        **{name: kind, "max_steps": 4, "batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.02, **options}
    )


def make(family: str, root: Path) -> None:
    """Runs every stage with its main options; each folder below ``root`` is one result."""
    dense = pico_folder(root / "dense", family)
    sqft.sparsify(dense, sqft.SparsifyConfig(batch_size=4), TOKENS, out=root / "wanda")
    sqft.sparsify(dense, sqft.SparsifyConfig(method="magnitude", sparsity=0.3), out=root / "magnitude")
    sqft.sparsify(
        dense,
        sqft.SparsifyConfig(
            pattern="2:4", samples=4, length=32, exclude=["model.layers.0.*" if family != "opt" else "fc1"]
        ),
        out=root / "2-4",
    )
    int4 = sqft.QuantizeConfig(group_size=32, format="gptq_v2", **BEFORE)
    sqft.quantize(root / "wanda", int4, TOKENS, out=root / "int4")
    sqft.quantize(
        root / "wanda",
        sqft.QuantizeConfig(
            group_size=-1,
            bits=3,
            symmetric=True,
            **BEFORE,
            method="rtn",
            exclude=["k_proj", "v_proj"] if family != "phi3" else ["qkv_proj"],
        ),
        out=root / "rtn",
    )
    sqft.quantize(
        dense,
        sqft.QuantizeConfig(
            group_size=32, act_order=False, true_sequential=False, format="compressed-tensors", **BEFORE
        ),
        TOKENS,
        first=sqft.SparsifyConfig(),
        out=root / "fused",
    )
    make_adapted(root)


def make_adapted(root: Path) -> None:
    """The stages from training on."""
    sqft.train(root / "wanda", training("sparse-peft", lora_dropout=0.1), EXAMPLES, out=root / "masked")
    sqft.train(root / "wanda", training("lora"), EXAMPLES, out=root / "lora")
    sqft.train(root / "int4", training("qa-sparse-peft", base=str(root / "wanda")), EXAMPLES, out=root / "aware")
    sqft.train(
        root / "int4",
        training(
            "qa-sparse-peft", search_space=[4, 2], learn_scales=True, learning_rate=1e-3, scale_learning_rate=1e-3
        ),
        EXAMPLES,
        out=root / "elastic",
    )
    sqft.train(root / "int4", training("sqft", gradient_checkpointing=True), EXAMPLES, out=root / "sqft")
    sqft.search(
        root / "elastic",
        sqft.SearchConfig(task="arithmetic", metric="loss", limit=8, evaluations=4),
        out=root / "found",
    )
    sqft.extract(root / "elastic", "minimal", root / "smallest")
    for name in ("masked", "aware", "found"):
        sqft.merge(root / name, out=root / f"{name}-merged")
    sqft.merge(root / "lora", sqft.MergeConfig(allow_dense=True), out=root / "lora-merged")
    model, tokenizer = sqft.load(root / "aware-merged")
    sqft.save(model, tokenizer, root / "saved")
    text = sqft.EvaluateConfig(text="builtin", length=64, max_tokens=512)
    for name in ("wanda", "int4", "aware", "masked-merged"):
        sqft.evaluate(root / name, text, out=root / f"score-{name}")
    sqft.evaluate(root / "masked-merged", sqft.EvaluateConfig(task="arithmetic", limit=6), out=root / "score-task")


def fingerprint(folder: Path) -> dict[str, Any]:
    """Per tensor: dtype, shape, hash, and the two sums that another processor comes near to. And the stage's numbers."""
    found: dict[str, Any] = {"tensors": {}, "numbers": {}}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found["tensors"][f"{file.relative_to(folder).as_posix()}:{name}"] = [
                str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(data).hexdigest()[:16],
                float(tensor.double().sum()), float(tensor.double().abs().sum()),
            ]  # fmt: skip
    manifest = folder / "sqft.json"
    if manifest.is_file():
        metrics = json.loads(manifest.read_text())["metrics"]
        found["numbers"] = {name: metrics[name] for name in NUMBERS if name in metrics}
    return found


def fingerprints(family: str) -> dict[str, Any]:
    """Of every result of a family."""
    with tempfile.TemporaryDirectory() as work:
        make(family, Path(work))
        return {folder.name: fingerprint(folder) for folder in sorted(Path(work).iterdir()) if folder.name != "dense"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = {"processor": processor(), "families": {family: fingerprints(family) for family in FAMILIES}}
    Path(sys.argv[1]).write_text(json.dumps(values, separators=(",", ":")))
