"""A training step with the logits of labelled tokens alone, chunk by chunk, against one with the model's own loss, of all
logits: SmolLM2-135M, LoRA, 16 sequences of 128 tokens of which half have a label, one process each, taken in turns.

    python benchmarks/bench_labels.py [--model FOLDER] [--steps 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

from common import check, update_results

CODE = """
import json, resource, sys, time
import torch
import sqft
import sqft.training.trainer as trainer
from sqft.recipe import resolve_model
model, steps, lean = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
torch.manual_seed(0)
if not lean:
    trainer.labels_loss = lambda model: None
live, tokenizer = sqft.load(resolve_model(model))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = "the cat sat on a mat and " * 40
ids = tokenizer(text)["input_ids"]
half = tokenizer.decode(ids[:64])
example = sqft.Example(half, tokenizer.decode(ids[64:127]))
config = sqft.TrainConfig(adapter="lora", max_steps=steps, batch_size=16, logging_steps=steps, eval_limit=0)
live = sqft.attach(live, sqft.SqftConfig(sparse_adapter=False))
found = sqft.train(live, config, [example] * 16, tokenizer=tokenizer)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": found["seconds"] / steps, "loss": found["loss"], "bytes": (peak - before) * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ran: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(given.rounds):
        for lean in ran:
            command = [sys.executable, "-c", CODE, given.model, str(given.steps), str(lean)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            ran[lean].append(json.loads(out.splitlines()[-1]))
            print(lean, ran[lean][-1], flush=True)
    mine, usual = ({key: median(row[key] for row in ran[lean]) for key in ran[lean][0]} for lean in (True, False))
    checks = [
        check("labels: seconds of a step / with all logits", mine["seconds"] / usual["seconds"], 1.0),
        check("labels: memory of training / with all logits", mine["bytes"] / usual["bytes"], 0.75),
        check("labels: relative difference of the mean loss", abs(mine["loss"] / usual["loss"] - 1), 1e-4),
    ]
    update_results("scale", "labels", {"labels alone": mine, "all logits": usual}, checks)


if __name__ == "__main__":
    main()
