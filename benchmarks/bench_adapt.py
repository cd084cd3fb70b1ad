"""What adapting gives back on a task, and what each step of it is worth: SmolLM2-135M at 50 %, float and INT4, and INT4
without pruning. Every row is a stage folder below ``runs/bench-adapt``, made by the verbs that the command line calls;
what is there is skipped, what was interrupted goes on.

    python benchmarks/bench_adapt.py [--task arc_easy] [--epochs 3] [--rows NAME ...] [--test]

Accuracy is that of the validation split; ``--test`` scores the rows of FINAL on the test split, once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, check, update_results

import sqft
from sqft.calibration.data import read_texts
from sqft.comparison import read_correct
from sqft.evaluation.intervals import paired
from sqft.recipe import resolve_model, run_stage
from sqft.tasks.lookup import get_task

TRAIN: dict[str, Any] = {"completion_only": False, "eval_limit": 100, "save_steps": 70}
BEST = {"target_modules": ["all"], "train_norms": True, "learning_rate": 1e-3}
DISTILLED = {"distill": "teacher", "distill_tokens": "all"}
QUANTIZE = {"samples": 32, "calibration": "task+c4", "repair": "layer", "keep_fractions": True}
# Name: stage, what it is made from, options. "task+c4" as calibration is half training problems, half C4.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "teacher": ("train", "dense", TRAIN | {"adapter": "lora"}),
    "LoRA, dense": ("merge", "teacher", {}),
    "Wanda": ("sparsify", "dense", {"samples": 64}),
    "repaired": ("sparsify", "dense", {"samples": 128, "calibration": "task+c4", "repair": "layer"}),
    "LoRA": ("train", "Wanda", TRAIN | {"adapter": "lora"}),
    "SparsePEFT's adapter": ("train", "Wanda", TRAIN),
    "SparsePEFT": ("merge", "SparsePEFT's adapter", {}),
    "best's adapter": ("train", "repaired", TRAIN | BEST | DISTILLED),
    "best": ("merge", "best's adapter", {}),
    "all kept weights": ("train", "repaired", TRAIN | DISTILLED | {"adapter": "sparse-full", "learning_rate": 1e-4}),
    "all kept weights, faster": ("train", "repaired", TRAIN | DISTILLED | {"adapter": "sparse-full",
                                                                           "learning_rate": 5e-4}),
    "best, then GPTQ": ("quantize", "best", QUANTIZE),
    "best INT4's adapter": ("train", "best, then GPTQ", TRAIN | DISTILLED | {
        "adapter": "qa-sparse-peft", "epochs": 1.0, "target_modules": ["all"], "learning_rate": 3e-4}),
    "best INT4": ("merge", "best INT4's adapter", {}),
    "INT4": ("quantize", "dense", QUANTIZE),
    "LoRA on INT4": ("train", "INT4", TRAIN | {"adapter": "sqft"}),
    "QA's adapter on INT4": ("train", "INT4", TRAIN | {"adapter": "qa-sparse-peft"}),
    "QA on INT4": ("merge", "QA's adapter on INT4", {}),
    "QA at 3e-4's adapter": ("train", "INT4", TRAIN | {"adapter": "qa-sparse-peft", "learning_rate": 3e-4}),
    "QA at 3e-4 on INT4": ("merge", "QA at 3e-4's adapter", {}),
    "LoRA, dense, then GPTQ": ("quantize", "LoRA, dense", QUANTIZE),
}  # fmt: skip
GROUPS = {"main": [name for name in ROWS if not name.endswith("adapter") and "at 3e-4" not in name]}
ROWS |= {
    "Wanda INT4": ("quantize", "Wanda", {**QUANTIZE, "repair": "none"}),
    "repaired blocks": ("sparsify", "dense", {"samples": 128, "calibration": "task+c4", "repair": "block",
                                              "batch_size": 1, "repair_precision": "bfloat16"}),
}  # fmt: skip
# What best's gain is from: each of its parts left out, or its base made another way.
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "without a teacher": ("repaired", BEST),
    "on the usual projections": ("repaired", {**BEST, "target_modules": []} | DISTILLED),
    "without norms": ("repaired", {**BEST, "train_norms": False} | DISTILLED),
    "at 3e-4": ("repaired", {**BEST, "learning_rate": 3e-4} | DISTILLED),
    "on Wanda": ("Wanda", BEST | DISTILLED),
    "on repaired blocks": ("repaired blocks", BEST | DISTILLED),
}
# The kept weights learn plain text from the dense model before the task.
RECOVER = {"adapter": "sparse-full", "learning_rate": 3e-4, "data": "text", "prompt": "", "completion": "{text}", "packing": True,
           "batch_size": 4, "gradient_accumulation": 1, "eval_limit": 0, "save_steps": 50, "warmup_steps": 20,
           "distill": "dense", "limit": None}  # fmt: skip
ROWS["recovered"] = ("train", "repaired", RECOVER)
APART["on recovered weights"] = ("recovered", BEST | DISTILLED)
for _name, (_base, _options) in APART.items():
    ROWS[f"best {_name}'s adapter"] = ("train", _base, TRAIN | _options)
    ROWS[f"best {_name}"] = ("merge", f"best {_name}'s adapter", {})
# Patterns that hardware knows: the base repaired in the same way, the paper's method on Wanda's and best on the repaired one.
PATTERNS = ("32:64", "2:4")
for _pattern in PATTERNS:
    _sparsify = {"method": "sparsegpt" if _pattern == "2:4" else "wanda", "pattern": _pattern}
    ROWS[f"Wanda {_pattern}"] = ("sparsify", "dense", {"samples": 64, "pattern": _pattern})
    ROWS[f"repaired {_pattern}"] = ("sparsify", "dense", ROWS["repaired"][2] | _sparsify)
    ROWS[f"SparsePEFT {_pattern}'s adapter"] = ("train", f"Wanda {_pattern}", TRAIN)
    ROWS[f"best {_pattern}'s adapter"] = ("train", f"repaired {_pattern}", TRAIN | BEST | DISTILLED)
    for _name in (f"SparsePEFT {_pattern}", f"best {_pattern}"):
        ROWS[_name] = ("merge", f"{_name}'s adapter", {})
    ROWS[f"best {_pattern}, then GPTQ"] = ("quantize", f"best {_pattern}", QUANTIZE)
# The paper's methods and LoRA, trained for so many epochs at each rate, all in the same way.
KINDS = {"LoRA of dense": ("dense", "lora"), "LoRA of sparse": ("Wanda", "lora"), "SparsePEFT": ("Wanda", "sparse-peft"),
         "kept weights": ("Wanda", "sparse-full"), "SQFT": ("Wanda INT4", "sqft"),
         "QA-SparsePEFT": ("Wanda INT4", "qa-sparse-peft")}  # fmt: skip
CELLS = {f"{epochs:g} x {rate:g}": {"learning_rate": rate, "epochs": epochs}
         for rate in (3e-4, 1e-3) for epochs in (1.0, 2.0, 3.0)}  # fmt: skip
BASELINES = []
for (_name, (_base, _kind)), (_cell, _options) in itertools.product(KINDS.items(), CELLS.items()):
    _row, _options = f"{_name}, {_cell}", {"adapter": _kind, **_options}
    if _kind.endswith("sparse-peft"):
        ROWS[f"{_row}, adapter"] = ("train", _base, TRAIN | _options)
        ROWS[_row] = ("merge", f"{_row}, adapter", {})
    else:  # stays beside its base, or has nothing to merge
        ROWS[_row] = ("train", _base, TRAIN | _options)
    BASELINES.append(_row)
    if _kind == "sparse-peft":
        ROWS[f"{_row}, then GPTQ"] = ("quantize", _row, {**QUANTIZE, "repair": "none"})
        BASELINES.append(f"{_row}, then GPTQ")
GROUPS["patterns"] = [name.format(pattern) for pattern in PATTERNS for name in (
    "Wanda {}", "repaired {}", "SparsePEFT {}", "best {}", "best {}, then GPTQ")]  # fmt: skip
GROUPS |= {"apart": [f"best {name}" for name in APART], "baselines": BASELINES}
FINAL = ("LoRA, dense", "SparsePEFT", "best", "best, then GPTQ", "best INT4")


class Bench:
    """The rows of one model and task."""

    def __init__(
        self, model: str, task: str, data_dir: Path, root: Path, training: dict[str, Any], samples: int
    ) -> None:
        self.task, self.data_dir, self.root = task, str(data_dir), root
        self.training, self.samples = training, samples
        self.c4 = str(data_dir / "calibration" / "c4.jsonl")
        if not (root / "dense").is_dir():
            sqft.save(*sqft.load(resolve_model(model)), root / "dense")

    def folder(self, name: str) -> Path:
        return self.root / name.replace(",", "").replace("'", "").replace(" ", "-")

    def make(self, name: str) -> dict[str, Any]:
        """Runs a row, and what it is made from, unless they are there; its metrics."""
        if name == "dense":
            return {}
        stage, source, given = ROWS[name]
        options = dict(given)
        self.make(source)
        if options.get("distill"):
            self.make(options["distill"])
            options["distill"] = str(self.folder(options["distill"]))
        if options.get("data") == "text":
            options = self.training | options | {"data": str(self.text())}
        elif stage in ("train", "quantize", "sparsify"):
            options["data_dir"] = self.data_dir
        if stage == "train" and "data" not in options:
            options = self.training | options | {"task": self.task}
        if options.get("calibration"):
            options["calibration"] = f"{self.task}+{self.c4}"
            options["samples"] = min(options["samples"], self.samples)
        config = sqft_config(stage)(**options)
        return run_stage(stage, config, str(self.folder(source)), self.folder(name), print)

    def text(self) -> Path:
        """C4, some of Wikipedia and the task's training problems, shuffled: 240,000 tokens with ARC-Easy."""
        file = self.root / "text.jsonl"
        if not file.is_file():
            texts = read_texts(self.c4)
            articles = read_texts(str(Path(self.c4).with_name("wiki.jsonl.gz")))
            sizes = itertools.accumulate(map(len, articles), initial=0)
            texts += [article for article, before in zip(articles, sizes, strict=False) if before <= 350_000]
            texts += [
                example.prompt + example.completion for example in get_task(self.task, self.data_dir).examples("train")
            ]
            random.Random(0).shuffle(texts)
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def score(self, name: str, split: str, limit: int | None) -> tuple[dict[str, Any], list[bool]]:
        """Its accuracy, and which problems were solved."""
        config = sqft.EvaluateConfig(task=self.task, data_dir=self.data_dir, split=split, batch_size=64, limit=limit)
        out = self.root / f"scores-{split}" / self.folder(name).name
        return run_stage("evaluate", config, str(self.folder(name)), out, print), read_correct(out)


def sqft_config(stage: str) -> type:
    return {"train": sqft.TrainConfig, "merge": sqft.MergeConfig, "quantize": sqft.QuantizeConfig,
            "sparsify": sqft.SparsifyConfig}[stage]  # fmt: skip


def row_of(bench: Bench, name: str, split: str, limit: int | None) -> dict[str, Any]:
    metrics = bench.make(name)
    scored, correct = bench.score(name, split, limit)
    kept = {key: metrics[key] for key in ("sparsity", "zeros_kept", "seconds", "bits") if key in metrics}
    return {"accuracy": scored["accuracy"], "interval": scored["accuracy_ci95"], **kept, "correct": correct}


def differences(rows: dict[str, dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """Of each pair that is there: the difference of accuracies and its paired 95 % interval."""
    found = {}
    for one, other in pairs:
        if one in rows and other in rows:
            a, b = rows[one]["correct"], rows[other]["correct"]
            found[f"{one} - {other}"] = [(sum(a) - sum(b)) / len(a), *paired(a, b)]
    return found


PAIRS = (("SparsePEFT", "LoRA"), ("best", "SparsePEFT"), ("best", "LoRA, dense"), ("all kept weights", "best"), ("all kept weights, faster", "best"),
         ("repaired", "Wanda"), ("best", "repaired"), ("best at 3e-4", "repaired"), ("best at 3e-4", "LoRA, dense"), ("recovered", "repaired"),
         ("best, then GPTQ", "best"), ("best INT4", "best, then GPTQ"), ("best INT4", "best"),
         *itertools.product(("QA on INT4", "QA at 3e-4 on INT4"), ("LoRA on INT4", "LoRA, dense, then GPTQ")),
         *((f"best {name}", "best") for name in APART), ("best without a teacher", "SparsePEFT"), ("best", "SparsePEFT, 1 x 0.001"),
         ("best", "LoRA of dense, 1 x 0.001"),
         *((one.format(pattern), other.format(pattern)) for pattern in PATTERNS for one, other in (
             ("best {}", "SparsePEFT {}"), ("best {}", "best"), ("best {}, then GPTQ", "best {}"))),
         *((f"{one}, {cell}", f"{other}, {cell}") for cell in CELLS for one, other in (
             ("SparsePEFT", "LoRA of sparse"), ("kept weights", "SparsePEFT"), ("QA-SparsePEFT", "SQFT"))),
         *((f"QA-SparsePEFT, {cell}", f"SparsePEFT, {cell}, then GPTQ") for cell in CELLS))  # fmt: skip


def checks_of(rows: dict[str, dict[str, Any]], apart: dict[str, list[float]], where: str) -> list[dict[str, Any]]:
    checks = []
    for lowest, highest, how in (
        ("SparsePEFT", "LoRA, dense", ""),
        ("SparsePEFT, 1 x 0.001", "LoRA of dense, 1 x 0.001", ", all at 1e-3"),
    ):
        if {"best", lowest, highest} <= rows.keys():
            low, mine, high = (rows[name]["accuracy"] for name in (lowest, "best", highest))
            checks.append(check(f"{where}: share of the gap to dense LoRA that is closed{how}", (mine - low) / (high - low), 0.5,
                                at_most=False))  # fmt: skip
    for name, limit in (("best, then GPTQ - best", -0.01), ("best INT4 - best", -0.01), *(
            (f"{qa} - {other}", limit) for qa in ("QA on INT4", "QA at 3e-4 on INT4")
            for other, limit in (("LoRA on INT4", -0.005), ("LoRA, dense, then GPTQ", 0.0)))):  # fmt: skip
        if name in apart:
            checks.append(check(f"{where}: {name}", apart[name][0], limit, at_most=False))
    if "best INT4 - best, then GPTQ" in apart:
        checks.append(check(f"{where}: best INT4 - best, then GPTQ, least of the interval",
                            apart["best INT4 - best, then GPTQ"][1], 0.0, at_most=False))  # fmt: skip
    return checks


def markdown() -> str:
    """The tables of docs/results."""
    lines = []
    for part, found in json.loads((RESULTS / "quality_adapt.json").read_text())["results"].items():
        lines += [f"| {part} | accuracy (95 % interval) | sparsity | zeros kept |", "|---|---|---|---|"]
        for name, row in found["rows"].items():
            low, high = row["interval"]
            pruned = row.get("sparsity", 0) > 0.2
            sparsity, kept = (f"{row[key]:.1%}" if pruned and key in row else "" for key in ("sparsity", "zeros_kept"))
            lines.append(f"| {name} | {row['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {sparsity} | {kept} |")
        lines += ["", "| paired difference | points (95 % interval) |", "|---|---|"]
        lines += [f"| {name} | {100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) |"
                  for name, (mean, low, high) in found["differences"].items()]  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--data-dir", type=Path, default=data)
    parser.add_argument("--limit", type=int, help="use the first N training problems")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--precision", default="auto", help="of products: bfloat16 on a CPU with a matrix unit")
    parser.add_argument("--micro-batch", type=int, help="sequences at a time, of the 16 of a step")
    parser.add_argument("--samples", type=int, default=128, help="at most so many calibration blocks of task and C4")
    parser.add_argument("--score-limit", type=int, help="score the first N problems of the split")
    parser.add_argument(
        "--rows", nargs="+", help=f"rows, or groups of them: {', '.join(GROUPS)}; default: main, of --test FINAL"
    )
    parser.add_argument("--label", help="of the results, beside those of the same task and epochs")
    parser.add_argument("--test", action="store_true", help="score FINAL on the test split")
    parser.add_argument("--root", type=Path, default=Path("runs") / "bench-adapt")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the last runs")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    training = {"epochs": arguments.epochs, "limit": arguments.limit, "precision": arguments.precision}
    if arguments.micro_batch:
        training |= {"batch_size": arguments.micro_batch, "gradient_accumulation": 16 // arguments.micro_batch}
    if arguments.precision == "bfloat16":
        training["attention"] = "eager"  # torch's backward of attention in bfloat16 is slow on a CPU
    model = "" if arguments.model == "demo-model" else f"{Path(arguments.model).name}, "
    part = f"{model}{arguments.task}, {arguments.epochs:g} epochs"
    root = arguments.root / part.replace(", ", "-").replace(" ", "-")
    bench = Bench(arguments.model, arguments.task, arguments.data_dir, root, training, arguments.samples)
    split = "test" if arguments.test else "validation"
    asked = arguments.rows or (FINAL if arguments.test else ["main"])
    names = [row for name in asked for row in GROUPS.get(name, [name])]
    rows = {name: row_of(bench, name, split, arguments.score_limit) for name in names}
    apart = differences(rows, PAIRS)
    where = ", ".join(filter(None, (part, arguments.label, split)))
    checks = checks_of(rows, apart, where)
    shown = {name: {key: value for key, value in row.items() if key != "correct"} for name, row in rows.items()}
    print(json.dumps({"rows": shown, "differences": apart, "checks": checks}, indent=1))
    update_results("quality_adapt", where, {"rows": shown, "differences": apart}, checks)


if __name__ == "__main__":
    main()
