"""NLS on SmolLM2-135M and the demo's task: what elastic rank costs a step, and what sub-adapters score on the test split.

One super-adapter is trained, and beside it adapters whose rank is fixed at the median (the same budget): SparsePEFT,
and plain LoRA, which cannot be merged. Sub-adapters are chosen by validation problems; every adapter is scored on the
test problems once.

    python benchmarks/bench_nls.py [--model FOLDER] [--examples N] [--test N]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bench_sparse_peft import ADAPTER, BATCH, make_step
from common import RESULTS, alternate, check, write_results

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.measuring.size import weight_bytes
from sqft.recipe import resolve_model

SPACE = [32, 24, 16]
TRAIN: dict[str, Any] = {"task": "arithmetic", "epochs": 1, "batch_size": 8, "learning_rate": 1.5e-3, "warmup_steps": 8,
                         "eval_limit": 48}  # fmt: skip
SEARCH = sqft.SearchConfig(strategy="hill-climb", task="arithmetic", metric="loss", limit=100, evaluations=24)


class _Arguments:
    gradient_accumulation_steps = 1


class _State:
    global_step = 0
    stateful_callbacks: dict[str, Any] = {}  # noqa: RUF012


def elastic_step(model: Any) -> Any:
    """A training step as the Trainer takes it, with the callback's part in it."""
    scheduler, state, arguments = sqft.RankScheduler(), _State(), _Arguments()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(1000, 40000, BATCH, generator=torch.Generator().manual_seed(0))
    scheduler.on_train_begin(arguments, state, None, model=model)  # type: ignore[arg-type]

    def step() -> None:
        scheduler.on_step_begin(arguments, state, None)  # type: ignore[arg-type]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scheduler.on_pre_optimizer_step(arguments, state, None)  # type: ignore[arg-type]
        optimizer.step()
        scheduler.on_optimizer_step(arguments, state, None)  # type: ignore[arg-type]
        optimizer.zero_grad()
        state.global_step += 1
        scheduler.on_step_end(arguments, state, None)  # type: ignore[arg-type]

    return step


def overhead(sparse: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step of elastic SparsePEFT, and of fixed ranks at the mean, in turn."""
    models = {}
    for name in ("elastic", "fixed"):
        model, _ = sqft.load(sparse)
        options = {"search_space": SPACE} if name == "elastic" else {"r": sum(SPACE) // len(SPACE)}
        config = sqft.SqftConfig(**{k: v for k, v in ADAPTER.items() if k != "r"}, **options)
        models[name] = sqft.attach(model, config).train()
    steps = {"elastic": elastic_step(models["elastic"]), "fixed": make_step(models["fixed"])}
    return {"seconds": alternate(steps, rounds), "mean_rank": sum(SPACE) / len(SPACE)}


def score(folder: Path, test: int) -> dict[str, Any]:
    config = sqft.EvaluateConfig(task="arithmetic", split="test", limit=test, batch_size=60)
    metrics = sqft.evaluate(folder, config)
    model, _ = sqft.load(folder)
    weights = sum(p.numel() for layer in adapter_layers(model).values() for name, p in layer.named_parameters()
                  if "lora_" in name)  # fmt: skip
    return {"accuracy": metrics["accuracy"], "accuracy_ci95": metrics["accuracy_ci95"], "problems": metrics["problems"],
            "adapter_weights": weights, "adapter_bytes": weight_bytes(folder)}  # fmt: skip


def table(sparse: str, runs: Path, examples: int, test: int) -> dict[str, Any]:
    """Trains, searches and scores."""
    median = SPACE[len(SPACE) // 2]
    alpha = 64
    adapters = {
        "super": {"adapter": "sparse-peft", "search_space": SPACE, "lora_alpha": alpha},
        "fixed SparsePEFT": {"adapter": "sparse-peft", "r": median, "lora_alpha": alpha * median // SPACE[0]},
        "fixed LoRA": {"adapter": "lora", "r": median, "lora_alpha": alpha * median // SPACE[0]},
    }
    trained = {name: sqft.train(sparse, sqft.TrainConfig(**TRAIN, **options, limit=examples), out=runs / name)
               for name, options in adapters.items()}  # fmt: skip
    searched = sqft.search(runs / "super", SEARCH, out=runs / "searched")
    for name in ("median", "minimal"):
        sqft.extract(runs / "super", name, runs / name)
    for plot in ("progress.svg", "pareto.svg"):
        shutil.copyfile(runs / "searched" / plot, RESULTS.parents[1] / "docs" / f"nls-{plot}")
    scores = {name: score(runs / name, test)
              for name in ("super", "median", "minimal", "searched", "fixed SparsePEFT", "fixed LoRA")}  # fmt: skip
    merged = sqft.merge(runs / "searched", out=runs / "merged")
    return {
        "examples": examples, "scores": scores, "train": {n: {k: m[k] for k in ("eval_loss", "steps", "seconds")}
                                                          for n, m in trained.items()},
        "search": {k: searched[k] for k in ("score", "evaluated", "configurations", "seconds", "scored_on")},
        "merged": {k: merged[k] for k in ("zeros_kept", "max_logit_difference")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--examples", type=int, default=480, help="to train on")
    parser.add_argument("--test", type=int, default=240, help="test problems")
    arguments = parser.parse_args()
    runs = Path("runs") / "bench-nls"
    shutil.rmtree(runs, ignore_errors=True)
    sparse = str(runs / "sparse")
    sqft.sparsify(resolve_model(arguments.model), sqft.SparsifyConfig(samples=32, length=256), out=sparse)
    results = {"overhead": overhead(sparse, 5), "table": table(sparse, runs, arguments.examples, arguments.test)}
    seconds, merged = results["overhead"]["seconds"], results["table"]["merged"]
    checks = [
        check("step of elastic rank / of a fixed one at the mean rank", seconds["elastic"] / seconds["fixed"], 1.03),
        check("searched sub-adapter, merged: pruned weights that are zero", merged["zeros_kept"], 1.0, at_most=False),
        check("searched sub-adapter: largest difference of merged logits", merged["max_logit_difference"], 1e-4),
    ]
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    write_results("nls", results, checks)


if __name__ == "__main__":
    main()
