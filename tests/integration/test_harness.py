"""lm-evaluation-harness and sqft's own scorers agree on every problem; every stage's folder is a model for it."""

from __future__ import annotations

import importlib.metadata
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, pico_tokenizer
from test_cli import call, fails
from tokenizers.processors import TemplateProcessing

import sqft
from sqft.evaluation.generation import solve
from sqft.evaluation.harness import register_model, run_harness
from sqft.evaluation.harness_tasks import write_tasks
from sqft.evaluation.scoring import score
from sqft.recipe import resolve_model
from sqft.tasks.base import Task
from sqft.tasks.lookup import get_task

pytest.importorskip("lm_eval", reason="needs the harness extra: pip install 'sqft[harness]'")

PROBLEMS = 64
WRITTEN = """
folder: written
splits: {train: train, test: test}
prompt: "Say {{word}}:"
completion: " {{answer}}"
answer: answer
extract: '(?s)(.*)'
stop: ["\\n\\n"]
max_new_tokens: 12
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory) -> Any:
    """No connection can be made, and what datasets caches goes to a temporary folder."""
    import datasets

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Problems in the hub's fields: ARC (three to five options of unlike lengths), WinoGrande, GSM8K."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choice(["oak", "iron", "is", "a", "river", "Blue", "the", "7"]) for _ in range(n))

    for split in ("train", "validation", "test"):
        arc, pairs, sums = [], [], []
        for i in range(PROBLEMS):
            texts = [words(draw.randint(1, 6)) + f" {k}" for k in range(draw.randint(3, 5))]
            labels = "ABCDE"[: len(texts)]
            arc.append({"question": f"{split} {i}: {words(draw.randint(2, 12))}?", "answerKey": draw.choice(labels),
                        "choices": {"text": texts, "label": list(labels)}})  # fmt: skip
            pairs.append({"sentence": f"{words(draw.randint(1, 6))} {i} _ {words(draw.randint(1, 5))}.",
                          "option1": words(2), "option2": words(1) + " x", "answer": draw.choice("12")})  # fmt: skip
            sums.append({"question": f"{split}: {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"})
        for name, records in (("arc_easy", arc), ("gsm8k", sums)):
            write(folder / name / f"{split}.jsonl", records)
        write(folder / "winogrande" / f"{'train_xl' if split == 'train' else split}.jsonl", pairs)
    return folder


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(record) for record in records))


def agree(model: Any, tokenizer: Any, task: Task, limit: int | None = None) -> dict[str, Any]:
    """Asserts that both engines give the same records and metrics, also where lm-eval itself calls the model (as --model
    hf does); returns the metrics."""
    from sqft.evaluation.harness_model import _HFLM, SqftLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqftLM, "_loglikelihood_tokens", _HFLM._loglikelihood_tokens)
        agree_by(model, tokenizer, task, limit)
    return agree_by(model, tokenizer, task, limit)


def agree_by(model: Any, tokenizer: Any, task: Task, limit: int | None) -> dict[str, Any]:
    quick, mine = score(model, tokenizer, task, "test", limit, 8, quiet=True)
    metrics, theirs, results = run_harness(model, tokenizer, task, "test", limit, batch_size=5)
    assert len(mine) == len(theirs) == metrics["problems"]
    for ours, other in zip(mine, theirs, strict=True):
        assert set(ours) == set(other)
        one, two = (torch.tensor(record.pop("log_likelihoods", [])) for record in (ours, other))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
        assert ours == other
    assert {key: metrics[key] for key in quick} == quick
    assert json.loads(json.dumps(results)) == results and results["config"]["model"] == "sqft"
    return {**metrics, "results": results["results"]}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
def test_multiple_choice_agrees_on_every_problem(name: str, start: bool, data: Path) -> None:
    """``start``: the tokenizer puts a token before every text, as Llama's and Gemma's do."""
    tokenizer = pico_tokenizer()
    if start:
        begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begin
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    metrics = agree(pico_model(), tokenizer, get_task(name, data))
    assert metrics["problems"] == PROBLEMS and 0 < metrics["correct"] < PROBLEMS
    result = metrics["results"][f"sqft_{name}"]
    assert result["acc,none"] == metrics["accuracy"] and result["acc_norm,none"] == metrics["accuracy_norm"]
    assert metrics["engine"] == f"lm-eval {importlib.metadata.version('lm-eval')}"


def test_generation_agrees_on_every_problem(tmp_path: Path) -> None:
    """Half of the answers are what the model writes."""
    model, tokenizer = pico_model(), pico_tokenizer()
    (tmp_path / "written.yaml").write_text(WRITTEN)
    task = get_task(str(tmp_path / "written.yaml"), tmp_path)
    words = [f"{i * i} {'ab' * (i % 7)}" for i in range(PROBLEMS)]
    for _ in range(2):  # the second time with answers
        texts = ["?"] * PROBLEMS
        if (tmp_path / "written").is_dir():
            found = solve(model, tokenizer, task, task.examples("test"), 8, quiet=True)
            texts = [r["generated"].upper() if i % 2 else "no" for i, r in enumerate(found)]
        write(
            tmp_path / "written" / "test.jsonl", [{"word": w, "answer": t} for w, t in zip(words, texts, strict=True)]
        )
    metrics = agree(model, tokenizer, task)
    assert metrics["correct"] == PROBLEMS // 2
    assert metrics["results"]["sqft_written"]["exact_match,strict-match"] == metrics["accuracy"] == 0.5


def test_a_shared_context_changes_no_likelihood() -> None:
    """Log-likelihood and whether it is what greedy decoding gives; rolling windows; what is too long."""
    from lm_eval.api.instance import Instance

    from sqft.evaluation.harness_model import SqftLM

    shared, plain = (
        SqftLM(pico_model(), pico_tokenizer(), share=share, batch_size=4, max_length=24) for share in (True, False)
    )
    pairs = [
        ("Say a", " b"),
        ("Say a", " longer"),
        ("Q", "x"),
        ("a text that is longer than it may be", " y"),
    ]
    for method, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [("some text of more than one window",), ("ab",)]),
    ):
        requests = [Instance(request_type=method, doc={}, arguments=pair, idx=0) for pair in arguments]
        ours, theirs = (getattr(lm, method)(requests, disable_tqdm=True) for lm in (shared, plain))
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64), rtol=1e-4, atol=1e-4
        )
    prompt = list(b"Say a")
    written = shared.model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, 5:].tolist()
    for lm in (shared, plain):
        likely, other = lm._loglikelihood_tokens([(None, prompt, written), (None, prompt, [*written[:2], 7])])
        assert likely[1] and not other[1]


def test_several_tasks_agree(data: Path) -> None:
    metrics = agree(pico_model(), pico_tokenizer(), get_task("arc_easy+gsm8k", data), 6)
    assert metrics["problems"] == 12 and set(metrics["tasks"]) == {"arc_easy", "gsm8k"}
    assert set(metrics["results"]) == {"sqft_arc_easy", "sqft_gsm8k"}


@pytest.mark.slow
def test_a_real_model_chooses_the_same(shared: Path) -> None:
    model, tokenizer = sqft.load(resolve_model("demo-model"))
    metrics = agree(model, tokenizer, get_task("arc_easy", shared / "data"), 60)
    assert 0.3 < metrics["accuracy"] < 0.9


@pytest.mark.slow
def test_a_real_model_writes_the_same() -> None:
    model, tokenizer = sqft.load(resolve_model("demo-model"))
    assert 0 < agree(model, tokenizer, get_task("arithmetic"), 24)["correct"] < 24


@pytest.fixture(scope="module")
def stages(dense: Path, sparse: Path, trained: Path, trained_lora: Path, tmp_path_factory) -> dict[str, tuple]:
    """A folder of every stage, and the ranks to evaluate it at."""
    folder = tmp_path_factory.mktemp("stages")
    training = ("--data", write_lines(folder / "d.jsonl"), "--completion", " {text}", "--max-steps", 4, "--batch-size", 4,
                "--learning-rate", 0.02, "--r", 4)  # fmt: skip
    sqft.quantize(sparse, sqft.QuantizeConfig(method="rtn", group_size=32), out=folder / "packed")
    for arguments in (
        ("train", folder / "packed", folder / "quantized", *training, "--adapter", "qa-sparse-peft"),
        ("train", sparse, folder / "elastic", *training, "--search-space", "8,4,1", "--r", 8),
        ("merge", trained, folder / "merged"),
    ):
        assert sqft.cli.main([str(a) for a in arguments]) == 0
    (folder / "ranks.yaml").write_text(
        "".join(f"{name}: 1\n" for name in sqft.get_ranks(sqft.load(folder / "elastic")[0]))
    )
    return {
        "dense": (dense, None), "sparse": (sparse, None), "packed": (folder / "packed", None),
        "adapter": (trained, None), "lora": (trained_lora, None), "adapter on packed": (folder / "quantized", None),
        "merged": (folder / "merged", None), "super-adapter": (folder / "elastic", None),
        "median": (folder / "elastic", "median"), "ranks file": (folder / "elastic", str(folder / "ranks.yaml")),
    }  # fmt: skip


def write_lines(file: Path) -> Path:
    write(file, [{"text": f"the river is {i}"} for i in range(16)])
    return file


STAGES = ("dense", "sparse", "packed", "adapter", "lora", "adapter on packed", "merged", "super-adapter", "median",
          "ranks file")  # fmt: skip


@pytest.fixture(scope="module")
def harness_tasks(data: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "out"
    assert write_tasks("arc_easy+gsm8k", out, data_dir=data, limit=24) == ["sqft_arc_easy", "sqft_gsm8k"]
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("unpack", [True, False])
def test_every_stage_is_a_model(stage: str, unpack: bool, stages: dict[str, tuple], data: Path,
                                harness_tasks: Path, tmp_path: Path) -> None:  # fmt: skip
    """As lm-eval's command line makes it: from strings. Equal to `sqft evaluate` of the same folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, ranks = stages[stage]
    register_model()
    arguments = f"pretrained={folder},unpack={unpack}" + (f",ranks={ranks}" if ranks else "")
    manager = TaskManager(include_path=str(harness_tasks), include_defaults=False)
    result: Any = simple_evaluate(model="sqft", model_args=arguments, tasks=["sqft_arc_easy"], batch_size=8,
                                  task_manager=manager, device="cpu", bootstrap_iters=0)  # fmt: skip
    config = sqft.EvaluateConfig(task="arc_easy", data_dir=str(data), limit=24, ranks=ranks, unpack=unpack)
    metrics = sqft.evaluate(folder, config, out=tmp_path / "out")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    for line, sample in zip(lines, result["samples"]["sqft_arc_easy"], strict=True):
        likelihoods = [score for score, _ in sample["filtered_resps"]]
        assert json.loads(line)["log_likelihoods"] == pytest.approx(likelihoods, rel=1e-5)
    found = result["results"]["sqft_arc_easy"]
    assert (found["acc,none"], found["acc_norm,none"]) == (metrics["accuracy"], metrics["accuracy_norm"])
    assert result["config"]["model_stage" if stage != "dense" else "model"]


def test_ranks_change_what_is_evaluated(stages: dict[str, tuple], data: Path, tmp_path: Path) -> None:
    """Each choice of ranks gives other log-likelihoods, in both engines, and a live model gets its own ranks back."""
    folder, _ = stages["super-adapter"]
    model, tokenizer = sqft.load(folder)
    before, found = sqft.get_ranks(model), {}
    for ranks in (None, "maximal", "median", "minimal", stages["ranks file"][1]):
        for engine in ("quick", "lm-eval"):
            out = tmp_path / f"{engine}-{len(found)}"
            config = sqft.EvaluateConfig(task="arc_easy", data_dir=str(data), limit=4, ranks=ranks, engine=engine)
            metrics = sqft.evaluate(model, config, tokenizer=tokenizer, out=out)
            assert metrics.get("ranks") == ranks and sqft.get_ranks(model) == before
            lines = (out / "predictions.jsonl").read_text().splitlines()
            found[ranks, engine] = [json.loads(line)["log_likelihoods"] for line in lines]
        assert found[ranks, "quick"] == [pytest.approx(row, rel=1e-5) for row in found[ranks, "lm-eval"]]
    of = {ranks: rows for (ranks, engine), rows in found.items() if engine == "quick"}
    assert of[None] == of["maximal"] and of["minimal"] == of[stages["ranks file"][1]]
    assert of["maximal"] != of["median"] != of["minimal"]


def test_evaluate_with_few_shot_examples(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    code, out, err = call(capsys, "evaluate", dense, "--task", "gsm8k", "--data-dir", harness_gsm8k(data, tmp_path),
                          "--engine", "lm-eval", "--fewshot", 2, "--limit", 6, "--out", tmp_path / "out", "--json")  # fmt: skip
    assert code == 0, err
    metrics = json.loads(out)
    assert (metrics["problems"], metrics["fewshot"]) == (6, 2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n-shot"] == {"sqft_gsm8k": 2} and results["n-samples"]["sqft_gsm8k"]["effective"] == 6
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(results["results"]["sqft_gsm8k"])
    task = get_task("gsm8k", tmp_path / "data")
    solved = {example.prompt + example.completion for example in task.examples("train")}
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    for record, example in zip(records, task.examples("test", 6), strict=True):
        first, second, rest = record["prompt"].split("\n\n")
        assert {first, second} < solved and first != second and rest == example.prompt


def harness_gsm8k(data: Path, folder: Path) -> Path:
    """A train split that is longer than what GSM8K holds out of it to choose by."""
    for split, times in (("train", 5), ("test", 1)):
        lines = (data / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        write(folder / "data" / "gsm8k" / f"{split}.jsonl", [
            {**record, "question": f"{record['question']} {i}"} for i in range(times) for record in records
        ])  # fmt: skip
    return folder / "data"


@pytest.mark.slow
def test_the_command_runs_written_tasks(stages: dict[str, tuple], tmp_path: Path, capsys) -> None:
    """`sqft write-tasks` and `sqft lm-eval`; a task that YAML cannot score calls sqft. Equal to `sqft evaluate`."""
    folder, _ = stages["packed"]
    code, out, err = call(capsys, "write-tasks", "arithmetic", tmp_path / "tasks", "--limit", 5, "--fewshot", 1)
    assert code == 0 and "sqft_arithmetic" in out, err
    assert "!function" in (tmp_path / "tasks" / "sqft_arithmetic.yaml").read_text()
    code, out, err = call(capsys, "lm-eval", "--model", "sqft", "--model_args", f"pretrained={folder}", "--include_path",
                          tmp_path / "tasks", "--tasks", "sqft_arithmetic", "--output_path", tmp_path / "out",
                          "--log_samples", "--batch_size", 5)  # fmt: skip
    assert code == 0 and "sqft_arithmetic" in out, err
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    config = sqft.EvaluateConfig(task="arithmetic", limit=5, engine="lm-eval", fewshot=1)
    metrics = sqft.evaluate(folder, config, out=tmp_path / "ours")
    ours = [json.loads(line) for line in (tmp_path / "ours" / "predictions.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["generated"]) for r in ours] == [
        (s["arguments"]["gen_args_0"]["arg_0"], s["resps"][0][0]) for s in theirs
    ]
    assert json.loads(results.read_text())["results"]["sqft_arithmetic"]["exact_match,none"] == metrics["accuracy"]


def test_what_goes_wrong(dense: Path, trained: Path, data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    arc = ("evaluate", dense, "--task", "arc_easy", "--data-dir", data, "--engine", "lm-eval", "--limit", "4")
    assert "few-shot examples are lm-eval's" in fails(
        capsys, 2, "evaluate", dense, "--task", "arc_easy", "--fewshot", 1
    )
    assert "engine lm-eval scores tasks" in fails(
        capsys, 2, "evaluate", dense, "--text", "builtin", "--engine", "lm-eval"
    )
    assert "evaluate another split" in fails(capsys, 2, *arc, "--fewshot", 1, "--split", "train")
    assert "has 64 training examples" in fails(capsys, 2, *arc, "--fewshot", 99)
    assert "limit is 0: it has to be greater than 0" in fails(capsys, 2, *arc[:-1], "0")
    assert "this model has no adapter" in fails(capsys, 2, *arc, "--ranks", "median")
    assert "rank is fixed" in fails(capsys, 2, "evaluate", trained, *arc[2:], "--ranks", "median")
    assert "already holds something" in fails(capsys, 2, "write-tasks", "arithmetic", dense)
    lm_eval = ("lm-eval", "--model", "sqft", "--tasks", "sqft_none", "--include_path", tmp_path, "--model_args")
    assert "Tasks not found" in fails(capsys, 2, *lm_eval, f"pretrained={dense}")
    from sqft.evaluation.harness_model import SqftLM

    with pytest.raises(sqft.UsageError, match="'peft' is an option of --model hf"):
        SqftLM(str(dense), peft=str(trained))

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for command in (arc, lm_eval):
        assert "pip install 'sqft[harness]'" in fails(capsys, 2, *command)


@pytest.mark.parametrize(("given", "asked"), [("cuda:0", "auto"), (None, "auto"), ("xpu:1", "xpu:1")])
def test_lm_evals_own_device_is_whatever_is_there(given: str | None, asked: str, dense: Path, monkeypatch) -> None:
    """Its command line says cuda:0 where none was asked for."""
    from sqft.evaluation import harness_model

    def load(source: Path, *, dtype: str, device: str) -> None:
        raise sqft.SqftError(f"on {device}")

    monkeypatch.setattr(harness_model, "load", load)
    with pytest.raises(sqft.SqftError, match=f"^on {asked}$"):
        harness_model.SqftLM(dense, device=given)
