"""What compression buys when a model is kept and when it answers: bytes on disk of each form, products of a layer for one
token beside torch's, and tokens a second of the whole model. SmolLM2-135M, and layers of Llama's sizes.

    python benchmarks/bench_serving.py [--only sizes|layers|decode|embeddings] [--threads 2] [--markdown]

A layer's weights are read from as many copies as do not fit into the caches, and all contestants take turns. The share of
bandwidth is of what summing a large tensor reads in the same process.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparsify import text_name
from common import RESULTS, alternate, check, update_results
from torch import Tensor, nn

import sqft
from sqft.benching.run import bandwidth
from sqft.evaluation.perplexity import perplexity
from sqft.formats.compact import CompactReader
from sqft.kernels.compact import pack
from sqft.kernels.cpu import library
from sqft.kernels.packed import pack_mask
from sqft.measuring.size import weight_bytes
from sqft.measuring.stage import decode_speed
from sqft.models.embeddings import round_embeddings
from sqft.models.reader import SafetensorsReader
from sqft.quantization.grid import GridSpec, fit
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized
from sqft.recipe import resolve_model
from sqft.serving.decoder import Decoder
from sqft.serving.layers import CompactLinear, Int4Linear

OUT = Path("runs") / "bench-serving"
SHAPES = ((576, 576), (1536, 576), (4096, 4096), (14336, 4096))
PATTERNS = {"50 %": {"sparsity": 0.5}, "32:64": {"pattern": "32:64"}}
CACHE = 256 << 20  # bytes that no cache here holds
MOST_COPIES = 127  # of small layers fewer than that: they come from the caches, as much of a small model does


def folders() -> dict[str, Path]:
    """Models whose sizes do not depend on how well they were made: by magnitude and by rounding."""
    if not (OUT / "dense").is_dir():
        sqft.save(*sqft.load(resolve_model("demo-model"), dtype="float16"), OUT / "dense")
    made = {"dense float16": OUT / "dense"}
    for name, options in {"dense": None, **PATTERNS}.items():
        source = OUT / "dense"
        if options is not None:
            source = made[f"{name}, float16"] = OUT / f"{name}-float16"
            if not source.is_dir():
                sqft.sparsify(OUT / "dense", sqft.SparsifyConfig(method="magnitude", **options), out=source)
        made[f"{name}, INT4"] = OUT / f"{name}-int4"
        if not made[f"{name}, INT4"].is_dir():
            sqft.quantize(source, sqft.QuantizeConfig(method="rtn", symmetric=True), out=made[f"{name}, INT4"])
    return made


def zstd(folder: Path) -> int | None:
    """Bytes of the folder's weights after ``zstd -19``; None where that is not installed."""
    if shutil.which("zstd") is None:
        return None
    command = ["zstd", "-19", "--stdout", "--quiet"]
    return sum(len(subprocess.run([*command, str(file)], check=True, capture_output=True).stdout)
               for file in folder.rglob("*.safetensors"))  # fmt: skip


def bound(folder: Path) -> int | None:
    """Bytes by the entropy of the integers and masks, weights independent, with scales as they are; of INT4 only."""
    reader = SafetensorsReader(folder)
    modules = [name.removesuffix(".qweight") for name in reader.layout if name.endswith(".qweight")]
    if not modules:
        return None
    whole = sum(
        t.nbytes for name, t in reader.layout.items() if name.rpartition(".")[2] not in ("qweight", "qzeros", "g_idx")
    )
    counts = torch.zeros(16, dtype=torch.int64)
    for module in modules:
        words = reader.get(f"{module}.qweight")
        for shift in range(0, 32, 4):
            counts += torch.bincount(((words >> shift) & 15).flatten(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    return whole + math.ceil(float(-(shares * shares.log2()).sum()) * int(counts.sum()) / 8)


def sizes(compressed: Callable[[Path], int | None] = zstd) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of each model: bytes as it is, and in compact form, both alone and under zstd, and the entropy bound."""
    rows, half = {}, None
    for name, folder in folders().items():
        row: dict[str, Any] = {"bytes": weight_bytes(folder), "zstd": compressed(folder), "bound": bound(folder)}
        half = half or row["bytes"]
        if not name.startswith("dense"):
            packed = folder.with_name(folder.name + "-compact")
            if not packed.is_dir():
                sqft.pack(folder, out=packed)
            row |= {"compact": weight_bytes(packed), "compact_zstd": compressed(packed), "bits": bits_a_weight(packed)}
        rows[name] = row | {"of_half": row.get("compact", row["bytes"]) / half}
        print(name, rows[name], flush=True)
    found = check("sizes: bits a weight of compact INT4 at 32:64, scales included", rows["32:64, INT4"]["bits"], 3.35)
    return rows, [found]


def bits_a_weight(folder: Path) -> float:
    """Of the compact weights, with scales."""
    reader = CompactReader(folder)
    used = weights = 0
    for module in reader.modules:
        compact = reader.compact(module)
        used += compact.mask_OB.nbytes + compact.values.nbytes
        weights += compact.mask_OB.shape[0] * compact.inputs
        used += reader.layer(module, empty=True).scales.nbytes if compact.bits else 0
    return 8 * used / weights


class Bfloat16(nn.Module):
    """Torch's product of a dense weight."""

    def __init__(self, w_OI: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", w_OI.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight)


def contestants(outputs: int, inputs: int) -> dict[str, nn.Module]:
    """One layer in each form."""
    w = torch.randn(outputs, inputs) * 0.02
    keep = (torch.rand(outputs, inputs // 64, 64).argsort(-1) < 32).view(outputs, inputs)
    grid = fit(w * keep, GridSpec(symmetric=True))
    packed = QuantLinear.from_quantized(Quantized(grid.integers(w * keep), grid), 64, True)
    mask = pack_mask(keep)
    found: dict[str, nn.Module] = {
        "dense bfloat16, torch": Bfloat16(w),
        "dense INT4, torch": Int4Linear(packed),
        "32:64 float16, sqft": CompactLinear.from_float((w * keep).half(), mask, None),
        "32:64 INT4, sqft": CompactLinear.from_packed(packed, mask),
    }
    if library.stores_zeros(4, 64):
        left_out = pack(packed.integers(), mask, 4)
        found["32:64 INT4, zeros left out"] = CompactLinear(left_out, grid.scale_OG, grid.zero_OG, 64, None)
    return found


def held(layer: nn.Module) -> int:
    """Bytes that a product reads of a weight."""
    return sum(t.nbytes for name, t in layer.named_buffers() if name not in ("starts", "zero"))


@torch.no_grad()
def layers() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds of a product of one token, and the share of the machine's bandwidth at which weights are read."""
    read, rows, checks = bandwidth(torch.get_num_threads()), {}, []
    for outputs, inputs in SHAPES:
        first, x, turns = contestants(outputs, inputs), torch.randn(1, inputs), {}
        for name, layer in first.items():
            copies = [layer, *(copy.deepcopy(layer) for _ in range(min(MOST_COPIES, CACHE // held(layer))))]
            turns[name] = partial(lambda turn, x: next(turn)(x), itertools.cycle(copies), x)
        seconds = alternate(turns, 60)
        shape = f"{outputs} x {inputs}"
        rows[shape] = {name: {"microseconds": 1e6 * s, "bytes": held(first[name]), "share": held(first[name]) / s / read}
                       for name, s in seconds.items()}  # fmt: skip
        print(shape, rows[shape], flush=True)
        if inputs < 4096:
            continue
        dense, int4 = seconds["dense bfloat16, torch"], seconds["dense INT4, torch"]
        checks += [
            check(
                f"layers: {shape}, dense bfloat16 / sparse float16", dense / seconds["32:64 float16, sqft"], 1.5, False
            ),
            check(
                f"layers: {shape}, dense INT4 of torch / sparse INT4", int4 / seconds["32:64 INT4, sqft"], 1.2, False
            ),
            check(
                f"layers: {shape}, sparse INT4's share of bandwidth",
                rows[shape]["32:64 INT4, sqft"]["share"],
                0.7,
                False,
            ),
        ]
    return {"bytes_a_second": read, "variant": library.VARIANTS[library.variant()], "layers": rows}, checks


def tokens_a_second(model: Any, tokens: int = 64) -> float:
    """Of the C++ decoder, after a prompt of 32 tokens."""
    decoder = Decoder(model)
    decoder.read([list(range(32))], tokens)
    seconds = []
    for i in range(tokens):
        start = time.perf_counter()
        decoder.step([0], [i], [32 + i])
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


def decode() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tokens a second at batch 1: through transformers with the model as loaded, the same with fast layers, and by the
    decoder."""
    rows: dict[str, Any] = {}
    for name, folder in folders().items():
        dense = name == "dense float16"
        model = sqft.load(folder, dtype="bfloat16" if dense else "float32" if "INT4" in name else "auto")[0]
        row: dict[str, Any] = {"loaded": decode_speed(model, 8)} if dense or "INT4" in name else {}
        if not dense:
            row |= {"layers": sqft.prepare(model), "prepared": decode_speed(model), "decoder": tokens_a_second(model)}
        rows[name] = row
        print(name, row, flush=True)
    half, int4, sparse4 = rows["dense float16"]["loaded"], rows["dense, INT4"], rows["32:64, INT4"]
    return rows, [
        check("decode: dense INT4, by the decoder / as loaded", int4["decoder"] / int4["loaded"], 8.0, at_most=False),
        check("decode: sparse float16 at 32:64, by the decoder / dense bfloat16, transformers",
              rows["32:64, float16"]["decoder"] / half, 1.5, at_most=False),
        check("decode: INT4 at 32:64 / dense INT4, both by the decoder", sparse4["decoder"] / int4["decoder"], 1.0, False),
    ]  # fmt: skip


def markdown() -> str:
    """The tables of docs/deploy.md."""
    results = json.loads((RESULTS / "decode.json").read_text())["results"]
    mega = lambda size: "" if size is None else f"{size / 1e6:.1f}"  # noqa: E731
    lines = [
        "| MB | as it is | zstd -19 | compact | compact, zstd -19 | entropy bound | compact / dense float16 |",
        "|---|" + "---|" * 6,
    ]
    for name, row in results["sizes"].items():
        if isinstance(row, dict) and "of_half" in row:
            lines.append(f"| {name} | {mega(row['bytes'])} | {mega(row['zstd'])} | {mega(row.get('compact'))} | "
                         f"{mega(row.get('compact_zstd'))} | {mega(row['bound'])} | {row['of_half']:.2f} |")  # fmt: skip
    for part in (results[name] for name in ("layers", "layers, avx2") if name in results):
        names = list(next(iter(part["layers"].values())))
        lines += ["", f"| {part['variant']}: microseconds (share of {part['bytes_a_second'] / 1e9:.1f} GB/s) | {' | '.join(names)} |",
                  "|---|" + "---|" * len(names)]  # fmt: skip
        for shape, row in part["layers"].items():
            numbers = " | ".join(f"{row[n]['microseconds']:.0f} ({row[n]['share']:.0%})" for n in names)
            lines.append(f"| {shape} | {numbers} |")
    kinds = {"loaded": "transformers, as loaded", "prepared": "transformers, fast layers", "decoder": "decoder"}
    lines += ["", f"| tokens a second | {' | '.join(kinds.values())} |", "|---|---|---|---|"]
    for name, row in results["decode"].items():
        if isinstance(row, dict) and kinds.keys() & row.keys():
            numbers = " | ".join(f"{row[kind]:.1f}" if kind in row else "" for kind in kinds)
            lines.append(f"| {name.replace('dense float16', 'dense bfloat16')} | {numbers} |")
    return "\n".join(lines)


@torch.no_grad()
def embeddings() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What ``--embeddings int8`` takes and gives: perplexity and logits of the dense model with nothing else rounded, and
    megabytes of the sparse INT4 one in compact form."""
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    texts = [data / "wikitext2_tokens" / "test.jsonl", data / "calibration" / "tiny.jsonl"]
    model, tokenizer = sqft.load(folders()["dense float16"], dtype="float32")
    prompt = tokenizer(
        "The capital of France is Paris, and the river that flows through it is the Seine.", return_tensors="pt"
    )

    def seen() -> tuple[Tensor, dict[str, float]]:
        scores = {text_name(text): perplexity(model, tokenizer, str(text), 1024, 3072)["perplexity"] for text in texts}
        return model(prompt.input_ids).logits, scores

    (before, half), _ = seen(), round_embeddings(model, "int8")
    after, small = seen()
    sizes = {}
    for asked in ("auto", "int8"):
        folder = OUT / f"embeddings-{asked}"
        if not folder.is_dir():
            config = sqft.QuantizeConfig(method="rtn", symmetric=True, embeddings=asked)
            sqft.quantize(folders()["50 %, float16"], config, out=folder)
            sqft.pack(folder, out=folder.with_name(folder.name + "-compact"))
        sizes[asked] = weight_bytes(folder.with_name(folder.name + "-compact"))
    rows = {"perplexity": {"float16": half, "int8": small}, "compact_bytes": sizes,
            "logits": float((after - before).abs().max() / before.abs().max()),
            "same_greedy": bool(torch.equal(after.argmax(-1), before.argmax(-1)))}  # fmt: skip
    worst = max(small[text] / half[text] for text in half)
    return rows, [check("embeddings: perplexity, int8 / float16, worst text", worst, 1.01)]


def main() -> None:
    parts: dict[str, Callable[..., Any]] = {
        "sizes": sizes,
        "layers": layers,
        "decode": decode,
        "embeddings": embeddings,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-zstd", action="store_true", help="leave out what takes most of the time")
    parser.add_argument("--clean", action="store_true", help="make the models anew")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    if arguments.no_zstd:
        parts["sizes"] = partial(sizes, lambda folder: None)
    if arguments.clean:
        shutil.rmtree(OUT, ignore_errors=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for name in [arguments.only] if arguments.only else parts:
        results, checks = parts[name]()
        part = f"{name}, avx2" if name == "layers" and results["variant"] == "avx2" else name  # beside AVX-512's
        checks = [{**each, "name": each["name"].replace(name, part, 1)} for each in checks]
        print(json.dumps(checks, indent=1))
        update_results("decode", part, results, checks)


if __name__ == "__main__":
    main()
