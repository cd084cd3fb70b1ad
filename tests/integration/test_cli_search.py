"""Elastic adapters from the command line: train, search, extract, merge, recipes, and what goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
import yaml
from optuna.study import get_all_study_summaries
from support import postgres
from test_cli import SQFT, call, fails

import sqft
from sqft.artifact import read_manifest
from sqft.searching.study import open_storage

ELASTIC = ["--task", "arithmetic", "--limit", 32, "--eval-limit", 4, "--max-steps", 6, "--batch-size", 4,
           "--search-space", "6,4,2", "--learning-rate", 0.02]  # fmt: skip
SCORE = ["--task", "arithmetic", "--metric", "loss", "--limit", 6]


@pytest.fixture(scope="module")
def elastic(sparse: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("elastic") / "adapter"
    assert sqft.cli.main([str(a) for a in ("train", sparse, out, *ELASTIC)]) == 0
    return out


def wait_for_trials(folder: Path, count: int) -> None:
    for _ in range(600):
        if any(log.read_text().count("evaluated") >= count for log in folder.glob(".out.searching-*/journal.log")):
            return
        time.sleep(0.05)
    raise AssertionError("the search does not begin")


@pytest.mark.parametrize("strategy", ["maximal", "minimal", "median", "most-frequent", "min-loss", "random",
                                      "hill-climb", "nsga2"])  # fmt: skip
def test_every_strategy_gives_a_sub_adapter_that_merges(strategy: str, elastic: Path, tmp_path: Path, capsys) -> None:
    code, out, err = call(capsys, "search", elastic, tmp_path / "found", "--strategy", strategy, "--evaluations", 9,
                          *SCORE, "--json")  # fmt: skip
    assert code == 0, err
    metrics, result = json.loads(out), json.loads((tmp_path / "found" / "search.json").read_text())
    searched = strategy in ("random", "hill-climb", "nsga2")
    assert metrics["evaluated"] == len(result["points"]) == (9 if searched else 1)
    assert metrics["score"] == max(p["score"] for p in result["points"]) and metrics["configurations"] == 3**6
    if searched:
        assert {p["kind"] for p in result["points"]} >= {"maximal", "minimal", "median"}
    ranks = yaml.safe_load((tmp_path / "found" / "ranks.yaml").read_text())
    assert ranks == metrics["ranks"] == result["chosen"]["ranks"]
    for plot in ("progress.svg", "pareto.svg"):
        ElementTree.parse(tmp_path / "found" / plot)
    assert call(capsys, "merge", tmp_path / "found", tmp_path / "one")[0] == 0
    assert call(capsys, "merge", elastic, tmp_path / "two", "--ranks", tmp_path / "found" / "ranks.yaml")[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert not list(tmp_path.glob(".found*"))


def test_extract_from_an_adapter_and_from_a_search(elastic: Path, tmp_path: Path, capsys) -> None:
    assert call(capsys, "search", elastic, tmp_path / "found", *SCORE, "--evaluations", 6, "--screen", 3)[0] == 0
    seen = {}
    for choice in ("median", "minimal", "best", "knee", "smallest-within 5%", tmp_path / "found" / "ranks.yaml"):
        out = tmp_path / f"{str(choice).split('/')[-1]}"
        code, text, err = call(capsys, "extract", tmp_path / "found", out, "--choice", choice, "--json")
        assert code == 0, err
        seen[str(choice)] = json.loads(text)["ranks"]
        sqft.load(out)
    assert set(seen["median"].values()) == {4} and set(seen["minimal"].values()) == {2}
    assert seen["best"] == seen[str(tmp_path / "found" / "ranks.yaml")]
    assert "not written by a search" in fails(capsys, 2, "extract", elastic, tmp_path / "x", "--choice", "best")
    # A sub-adapter is no super-adapter.
    assert "rank is fixed" in fails(capsys, 2, "search", tmp_path / "median", tmp_path / "x", *SCORE)


@pytest.mark.slow
def test_two_workers_and_a_named_storage(elastic: Path, tmp_path: Path, capsys) -> None:
    storage = f"sqlite:///{tmp_path}/trials.db"
    arguments = ("search", elastic, tmp_path / "found", *SCORE, "--evaluations", 8, "--storage", storage)
    code, out, err = call(capsys, *arguments, "--workers", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluated"] == 8
    trials = json.loads((tmp_path / "found" / "search.json").read_text())["trials"]
    ranks = [tuple(t["ranks"].values()) for t in trials if t.get("purpose") == "evaluated"]
    assert len(set(ranks)) == 8
    # What is in the storage is not evaluated again, whatever is picked.
    code, out, err = call(capsys, *arguments, "--pick", "knee", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["evaluated"] == 8, err


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(elastic: Path, tmp_path: Path) -> None:
    command = [*SQFT, "search", elastic, tmp_path / "out", *SCORE, "--limit", 24, "--evaluations", 30, "--workers", 2]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True) as process:
        wait_for_trials(tmp_path, 4)
        workers = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        workers[0].kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "was killed (signal 9): another one takes its place" in err, err
    assert read_manifest(tmp_path / "out").metrics["evaluated"] == 30 and not list(tmp_path.glob(".out*ing-*"))


@pytest.mark.slow
@pytest.mark.skipif(postgres.programs() is None, reason="no PostgreSQL server or no driver of it (psycopg)")
def test_a_database_server_is_shared_and_its_loss_is_one_line(elastic: Path, tmp_path: Path, capsys) -> None:
    with postgres.server() as database:
        url = database()
        shared = ["search", elastic, "--evaluations", 8, *SCORE, "--storage", url, "--json"]
        both = [subprocess.Popen([str(part) for part in (*SQFT, *shared[:2], tmp_path / name, *shared[2:])],
                                 stdout=subprocess.PIPE, text=True) for name in ("one", "two")]  # fmt: skip
        found = [json.loads(process.communicate(timeout=120)[0])["evaluated"] for process in both]
        assert max(found) == 8 and [process.returncode for process in both] == [0, 0]
        trials = json.loads((tmp_path / ("one", "two")[found.index(8)] / "search.json").read_text())["trials"]
        assert len({str(t["ranks"]) for t in trials if t.get("purpose") == "evaluated"}) == 8
        url = database()
        longer = ["search", elastic, tmp_path / "lost", *SCORE, "--limit", 24, "--evaluations", 200, "--storage", url]
        process = subprocess.Popen([str(part) for part in (*SQFT, *longer)], stderr=subprocess.PIPE, text=True)
        storage = open_storage(url)
        while process.poll() is None and sum(study.n_trials for study in get_all_study_summaries(storage)) < 4:
            time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1 and "cannot be reached any more" in err, err


@pytest.mark.slow
def test_a_signal_stops_a_search_and_the_same_command_goes_on(elastic: Path, tmp_path: Path) -> None:
    command = [*SQFT, "search", elastic, tmp_path / "out", *SCORE, "--limit", 24, "--evaluations", 40]
    command = [str(part) for part in command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_trials(tmp_path, 4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    straight = [sys.executable if part == sys.executable else part.replace("/out", "/straight") for part in command]
    assert subprocess.run(straight, capture_output=True).returncode == 0
    ours, theirs = (json.loads((tmp_path / d / "search.json").read_text())["points"] for d in ("out", "straight"))
    assert ours == theirs and len(ours) == 40


def test_a_recipe_with_a_search(dense: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {dense}
output: {tmp_path / "run"}
sparsify: {{samples: 4, length: 32}}
quantize: {{samples: 4, length: 32, group_size: 32}}
train: {{adapter: qa-sparse-peft, task: arithmetic, limit: 16, eval_limit: 4, max_steps: 3, batch_size: 4, search_space: [4, 2]}}
search: {{task: arithmetic, limit: 4, metric: loss, evaluations: 4, strategy: nsga2}}
merge: {{}}
evaluate: {{task: arithmetic, limit: 4}}
""")
    code, out, err = call(capsys, "run", recipe)
    assert code == 0 and "| search" not in err, err
    assert "search" in out and "100.000 %" in out
    assert call(capsys, "run", recipe)[2].count("unchanged, skipped") == 9
    # Every strategy; what comes before the search is skipped.
    for strategy in ("maximal", "minimal", "median", "most-frequent", "min-loss", "random", "hill-climb"):
        recipe.write_text(re.sub("strategy: [a-z0-9-]+", f"strategy: {strategy}", recipe.read_text()))
        code, out, err = call(capsys, "run", recipe, "--json")
        assert code == 0 and err.count("unchanged, skipped") == 6, err
        result = json.loads(out)
        assert result["search"]["evaluated"] == (4 if strategy in ("random", "hill-climb") else 1)
        assert result["merge"]["zeros_kept"] == 1.0 and result["merge"]["max_logit_difference"] < 1e-4
    recipe.write_text(recipe.read_text().replace("search_space: [4, 2]", "r: 4"))
    assert "'search' needs 'train' with a search_space" in fails(capsys, 2, "run", recipe)


def test_what_goes_wrong(elastic: Path, trained: Path, sparse: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    for code, message, arguments in (
        (2, "must not see the test split", ("search", elastic, out, "--task", "arithmetic", "--split", "test")),
        (2, "rank is fixed", ("search", trained, out, *SCORE)),
        (2, "not an adapter folder", ("search", sparse, out, *SCORE)),
        (2, "give a task", ("search", elastic, out)),
        (2, "unknown strategy 'hill-clim': did you mean 'hill-climb'", ("search", elastic, out, *SCORE, "--strategy", "hill-clim")),
        (2, "'kneee' picks nothing", ("search", elastic, out, *SCORE, "--pick", "kneee")),
        (2, "cannot open storage", ("search", elastic, out, *SCORE, "--storage", "mysqll://x")),
        (2, "screen is 9", ("search", elastic, out, *SCORE, "--screen", "9")),
        (2, "search_space: 'x' is not a number", ("train", sparse, out, "--task", "arithmetic", "--search-space", "x")),
        (2, "search_space is 0: it has to be greater than 0", ("train", sparse, out, "--task", "arithmetic", "--search-space", "0,4")),
        (2, "rank_groups go with", ("train", sparse, out, "--task", "arithmetic", "--rank-groups", "layer")),
        (2, "matches no module", ("train", sparse, out, *ELASTIC, "--rank-groups", "q_proj+x_proj")),
        (2, "rank is fixed", ("merge", trained, out, "--ranks", "median")),
    ):  # fmt: skip
        assert message in fails(capsys, code, *arguments)
        assert not out.exists()
    broken = tmp_path / "broken"
    shutil.copytree(elastic, broken)
    (broken / "ranks.json").write_text("{")
    assert "truncated or changed" in fails(capsys, 1, "search", broken, out, *SCORE, "--strategy", "min-loss")
