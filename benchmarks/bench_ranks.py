"""What elastic rank brings: held-out loss of a super-adapter's ranks 16, 8 and 4 and of fixed ranks, by how they were
trained. stories260K (TinyStories, 260 thousand weights) pruned by Wanda to 60 %, two seeds, a few minutes on one core.

    python benchmarks/bench_ranks.py [--data FOLDER]
    python benchmarks/bench_ranks.py --markdown     # the table of docs/nls.md, from the result file
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, check, write_results
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import sqft
from sqft.training.data import collate

SPACE, ALPHA, STEPS, SEEDS, LENGTH, HELD_OUT = [16, 8, 4], 32, 80, (0, 1), 64, 96
ELASTIC = {"search_space": SPACE, "lora_alpha": ALPHA}
OWN = {**ELASTIC, "rank_scaling": "own"}
FIXED = {"r": 16, "lora_alpha": ALPHA}
# Name: the adapter, how its ranks are set, optimiser steps. A step of distill-ranks costs three passes.
ROWS: dict[str, tuple[dict[str, Any], str, int]] = {
    "fixed 16": (FIXED, "", STEPS),
    "fixed 8": ({"r": 8, "lora_alpha": ALPHA}, "", STEPS),
    "fixed 4": ({"r": 4, "lora_alpha": ALPHA}, "", STEPS),
    "fixed 4, alpha 8": ({"r": 4, "lora_alpha": ALPHA // 4}, "", STEPS),
    "fixed 16, dense teacher": (FIXED, "teacher", STEPS),
    "uniform": (ELASTIC, "uniform", STEPS),
    "uniform, own": (OWN, "uniform", STEPS),
    "sandwich": (ELASTIC, "sandwich", STEPS),
    "distill-ranks": (ELASTIC, "distill-ranks", STEPS),
    "distill-ranks, own": (OWN, "distill-ranks", STEPS),
    "fixed 16, 3 times the steps": (FIXED, "", 3 * STEPS),
    "fixed 4, 3 times the steps": ({"r": 4, "lora_alpha": ALPHA}, "", 3 * STEPS),
    "uniform, 3 times the steps": (ELASTIC, "uniform", 3 * STEPS),
    "uniform, own, 3 times the steps": (OWN, "uniform", 3 * STEPS),
}


def read_model(folder: Path) -> LlamaForCausalLM:
    """llama2.c's ``stories260K.bin``: seven numbers, then the weights of each kind, block after block, in float32."""
    raw = (folder / "stories260K.bin").read_bytes()
    width, inner, blocks, heads, kv_heads, words, length = struct.unpack("7i", raw[:28])
    flat = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())
    at, state, keys = 0, {}, width // heads * kv_heads
    per_block = (("input_layernorm", (width,)), ("self_attn.q_proj", (width, width)),
                 ("self_attn.k_proj", (keys, width)), ("self_attn.v_proj", (keys, width)),
                 ("self_attn.o_proj", (width, width)), ("post_attention_layernorm", (width,)),
                 ("mlp.gate_proj", (inner, width)), ("mlp.down_proj", (width, inner)),
                 ("mlp.up_proj", (inner, width)))  # fmt: skip
    order = [("model.embed_tokens.weight", (abs(words), width))]
    order += [(f"model.layers.{i}.{name}.weight", shape) for name, shape in per_block for i in range(blocks)]
    for name, shape in [*order, ("model.norm.weight", (width,))]:
        w = flat[at : at + int(np.prod(shape))].view(shape)
        at += w.numel()
        if ".q_proj" in name or ".k_proj" in name:  # llama2.c rotates neighbours, transformers the halves of a head
            pairs = w.view(-1, width // heads // 2, 2, width)
            w = pairs.transpose(1, 2).reshape(shape)
        state[name] = w
    config = LlamaConfig(vocab_size=abs(words), hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
                         tie_word_embeddings=True, rms_norm_eps=1e-5)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=False)  # the head is the embedding
    model.tie_weights()
    return model.eval()


def read_blocks(folder: Path, texts: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, LENGTH] to train on, held out, and for calibration, in an order that a seed draws."""
    raw, at = (folder / "tok512.bin").read_bytes(), 4
    pieces: dict[bytes, int] = {}
    count = 0
    while at < len(raw):
        _, size = struct.unpack("fi", raw[at : at + 8])
        pieces.setdefault(raw[at + 8 : at + 8 + size], count)
        at, count = at + 8 + size, count + 1
    lines = texts.read_text(encoding="utf-8").splitlines()[:500]
    stream = [token for line in lines for token in encode(json.loads(line)["text"][:400], pieces)]
    blocks = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    return blocks[HELD_OUT:-32], blocks[:HELD_OUT], blocks[-32:]


def encode(text: str, pieces: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding: of all neighbours that make a piece, those of the first piece are joined first; the pieces'
    scores fall with their index. What has no piece is bytes, which begin at 3."""
    names = {index: piece for piece, index in pieces.items()}
    ids: list[int] = []
    for character in " " + text:
        piece = character.encode("utf-8")
        ids += [pieces[piece]] if piece in pieces else [byte + 3 for byte in piece]
    while True:
        joined = [(pieces.get(names[a] + names[b]), i) for i, (a, b) in enumerate(pairwise(ids))]
        best = min(((piece, i) for piece, i in joined if piece is not None), default=None)
        if best is None:
            return [1, *ids]
        ids[best[1] : best[1] + 2] = [best[0]]


@torch.no_grad()
def loss(model: Any, blocks: Tensor) -> float:
    return float(model(input_ids=blocks, labels=blocks).loss)


class DistillTrainer(sqft.Distill, Trainer):
    pass


def run(name: str, seed: int, folder: Path, blocks: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Held-out loss by rank of one row, and the seconds of processor that its training took."""
    adapter, ranks, steps = ROWS[name]
    train, held_out, calibration = blocks
    model = read_model(folder)
    sqft.sparsify(model, sqft.SparsifyConfig(sparsity=0.6), calibration)
    set_seed(seed)
    peft_model = sqft.attach(model, sqft.SqftConfig(**adapter))
    rows = [{"input_ids": row, "labels": row} for row in train.tolist()]
    given: dict[str, Any] = {"teacher": read_model(folder)} if ranks == "teacher" else {}
    if "search_space" in adapter:
        strategy = "sandwich" if ranks == "distill-ranks" else ranks
        given = {"callbacks": [sqft.RankScheduler(strategy, seed=seed)], "distill_ranks": ranks == "distill-ranks"}
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            work, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, lr_scheduler_type="cosine",
            warmup_steps=10, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, seed=seed,
        )  # fmt: skip
        begun = time.process_time()
        DistillTrainer(model=peft_model, args=arguments, train_dataset=rows, data_collator=partial(collate, fill=0),
                       **given).train()  # fmt: skip
    result: dict[str, Any] = {"seconds": time.process_time() - begun}
    elastic = sqft.Elastic(peft_model.eval())
    if not elastic.groups:
        return result | {str(adapter["r"]): loss(peft_model, held_out)}
    for rank in SPACE:
        with elastic.at({group.name: rank for group in elastic.groups}):
            result[str(rank)] = loss(peft_model, held_out)
    return result


def checks_of(table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found, as differences of losses at the rank where the first of two is worst in comparison."""
    thrice = ", 3 times the steps"
    alone = {str(rank): table[f"fixed {rank}"][str(rank)] for rank in SPACE}

    def differ(name: str, one: dict[str, float], other: dict[str, float]) -> dict[str, Any]:
        return check(name, max(one[key] - other[key] for key in one if key.isdigit() and key in other), 0.0)

    return [
        differ("fixed 16 - uniform, equal passes", table["fixed 16"], table["uniform"]),
        differ("fixed 16 - uniform, three times as many", table[f"fixed 16{thrice}"], table[f"uniform{thrice}"]),
        differ("fixed 16 - distill-ranks own, equal passes", table[f"fixed 16{thrice}"], table["distill-ranks, own"]),
        differ("distill-ranks own - distill-ranks", table["distill-ranks, own"], table["distill-ranks"]),
        differ("three sizes: uniform - a training for each, equal passes in all", table[f"uniform{thrice}"], alone),
        differ("three sizes: a training for each - distill-ranks own, equal passes in all", alone,
               table["distill-ranks, own"]),
    ]  # fmt: skip


def markdown() -> str:
    """The table of docs/nls.md, from the result file."""
    file = RESULTS / "ranks.json"
    content = json.loads(file.read_text())
    results, machine = content["results"], content["machine"]
    lines = [
        f"**{machine['processor']}, {machine['threads']} thread** (`benchmarks/results/{file.name}`, "
        f"{content['date'][:10]}): held-out loss, mean of {len(SEEDS)} seeds; dense {results['dense']:.2f}, pruned and "
        f"not adapted {results['pruned']:.2f}.", "",
        "| trained as | passes | " + " | ".join(f"rank {rank}" for rank in SPACE) + " | CPU s |",
        "|---|---|" + "---|" * (len(SPACE) + 1),
    ]  # fmt: skip
    for name, row in results["rows"].items():
        cells = [f"{row[str(rank)]:.3f}" if str(rank) in row else "-" for rank in SPACE]
        lines.append(f"| {name} | {row['passes']} | " + " | ".join(cells) + f" | {row['seconds']:.1f} |")
    return "\n".join([*lines, "", f"Seeds differ by {results['seeds_differ']:.3f} at most."])


def main() -> None:
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=shared, help="folder with models/stories260K and calibration")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/nls.md, measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    torch.set_num_threads(1)
    folder = arguments.data / "models" / "stories260K"
    blocks = read_blocks(folder, arguments.data / "calibration" / "tiny.jsonl")
    model = read_model(folder)
    dense = loss(model, blocks[1])
    sqft.sparsify(model, sqft.SparsifyConfig(sparsity=0.6), blocks[2])
    table, apart = {}, 0.0
    for name, (_, ranks, steps) in ROWS.items():
        seeds = [run(name, seed, folder, blocks) for seed in SEEDS]
        table[name] = {key: statistics.mean(seed[key] for seed in seeds) for key in seeds[0]}
        table[name]["passes"] = steps * (3 if ranks == "distill-ranks" else 1)
        apart = max(apart, *(max(s[k] for s in seeds) - min(s[k] for s in seeds) for k in seeds[0] if k.isdigit()))
        print(name, table[name], flush=True)
    checks = checks_of(table)
    results = {"dense": dense, "pruned": loss(model, blocks[1]), "rows": table, "seeds_differ": apart}
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    write_results("ranks", results, checks)


if __name__ == "__main__":
    main()
