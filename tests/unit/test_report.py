"""``sqft report``: what it reads, draws and says, and what it does with folders that are broken or empty."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.manifest import edit

import sqft
from sqft import artifact, cli
from sqft.config import EvaluateConfig, MergeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.errors import UsageError
from sqft.options import to_dict
from sqft.reporting import facts, figures
from sqft.reporting.collect import Section, numbers, read_section
from sqft.reporting.page import report
from sqft.reporting.tables import Column, Table

EVIL = "</pre><script>alert(1)</script> & 'x' \"y\" | **z** `"
LONE = "\ud800"  # half of a character, which JSON can hold and UTF-8 cannot


def stage(folder: Path, name: str, parent: str | None = None, metrics: dict | None = None, config: dict | None = None,
          seed: int | None = 0) -> Path:  # fmt: skip
    """A stage folder with a manifest and no weights."""
    folder.mkdir(parents=True)
    manifest = artifact.Manifest(stage=name, parent=parent, metrics=metrics or {}, config=config or {}, seed=seed)
    artifact.write_manifest(folder, manifest)
    return folder


def evaluation(folder: Path, parent: str, accuracy: float, answers: list[tuple[str, bool]], task: str = "sums") -> Path:
    metrics = {"task": task, "split": "test", "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.1, accuracy + 0.1],
               "problems": len(answers), "seconds": 1.0}  # fmt: skip
    stage(folder, "evaluate", parent, metrics, to_dict(EvaluateConfig(task="arithmetic")))
    lines = [{"prompt": f"Q{i}", "generated": text, "answer": "1", "correct": correct}
             for i, (text, correct) in enumerate(answers)]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without weights: sparse, adapter, merged, two of them evaluated."""
    root = tmp_path / "run"
    by_module = {f"model.layers.{i}.mlp.up_proj": 0.4 + 0.1 * i for i in range(3)}
    stage(root / "sparsify", "sparsify", "some/model", {"sparsity": 0.5, "by_module": by_module, "parameters": 100,
          "zeros": 40, "seconds": 1.5}, to_dict(SparsifyConfig(samples=4)))  # fmt: skip
    train = stage(
        root / "train", "train", "../sparsify", {"trainable_parameters": 10}, to_dict(TrainConfig(task="arithmetic"))
    )
    log = [{"loss": 2 / (i + 1), "learning_rate": 1e-3, "step": i} for i in range(5)] + [{"eval_loss": 1.0, "step": 4}]
    (train / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    kept = {"pruned": 40, "filled": 0, "zeros_kept": 1.0, "sparsity": 0.5, "max_logit_difference": 0.0}
    stage(root / "merge", "merge", "../train", kept, to_dict(MergeConfig()))
    evaluation(
        root / "evaluate" / "sparsify", "../../sparsify", 0.25, [("0", False), ("1", True), ("2", False), ("", False)]
    )
    evaluation(
        root / "evaluate" / "merge", "../../merge", 0.75, [("1", True), ("1" + LONE, True), ("1", True), (EVIL, False)]
    )
    return root


class Page(HTMLParser):
    """Checks that tags are closed in order; collects the texts of elements and the addresses that they name."""

    VOID = ("meta", "link", "br", "img", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_everything_and_asks_for_nothing(run: Path, tmp_path: Path) -> None:
    result = report([run])
    assert result == {
        "report": str(run / "report.html"),
        "markdown": str(run / "report.md"),
        "sections": 1,
        "stages": 5,
    }
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and page.addresses == ["data:,"] and "http" not in text.replace("http-equiv", "")
    allowed = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{allowed}">' in text.split("<style>")[0]
    for title in ("Pipeline", "Stages", "Training", "Zeros kept", "Sparsity by layer and module", "Samples", "Reproduce",
                  "Environment"):  # fmt: skip
        assert title in page.words
    assert "Search" not in page.words and "Weights before and after" not in page.words  # there was none
    assert "</pre><script>" not in text and EVIL in page.words
    for drawing in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    # The same folders give the same bytes, and nothing is left beside them.
    first = text
    report([run])
    assert (run / "report.html").read_text() == first
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_what_it_says(run: Path) -> None:
    section = read_section(run, "run")
    assert [s.name for s in section.stages] == ["some/model (start)", "sparsify", "train", "merge"]
    assert facts.verdict(section) == (
        "**merge**: **75.0 %** on sums, one 50.0 % sparse float model in which **every pruned weight is still exactly zero**; "
        "sparsify has 25.0 %."
    )
    rows = {row[0]: row for row in facts.stage_table(section).cells()}
    assert rows["merge"][1] == "75.0 % (65.0 - 85.0 %)" and rows["merge"][4] == "100.000 %"
    assert rows["train"][1] == "-"
    assert facts.zeros_table(section).cells() == [["merge", "40", "0", "100.000 %", "-", "0"]]
    assert f"sqft {sqft.__version__}" in facts.versions(section).split(", ")
    text = Path(report([run], run / "out.html")["markdown"]).read_text()
    assert "| merge | 75.0 % (65.0 - 85.0 %) |" in text
    assert f"sqft train {run}/sparsify {run}/train --task arithmetic\n" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """Whatever a folder's files say is text on the page: names, kinds, options, versions, curves, layers, trials."""
    evil = "\"><script>alert(1)</script> **b** {{ 7 * 7 }} ' &"
    name = evil.replace("/", "|")
    root = tmp_path / name
    stage(root / "a", evil, "hub/" + evil, {"by_module": {f"3.{evil}": 0.5}}, {"method": evil})
    train = stage(root / name, "train", "../a", {"trainable_parameters": 10}, {"adapter": evil, "task": evil})
    (train / "training_log.jsonl").write_text('{"loss": 1, "step": 1}\n{"loss": 2, "step": 2}\n')
    found = stage(
        root / "found", "search", "../a", {"super_adapter": f"../{name}", "ranks": {f"1.{evil}": 4}, "trial": evil}
    )
    trials = [{"number": i, "ranks": {}, "score": i, "cost": i, "kind": evil} for i in range(3)]
    (found / "search.json").write_text(json.dumps({"points": trials}))
    evaluation(root / "evaluate", f"../{name}", 0.5, [(evil, True), ("x", False)], task=evil)
    edit(root / "a", versions={evil: evil}, created=evil)
    rows = [
        {"name": evil, "method": evil, "precision": evil, "accuracy": 0.1 * i, "size": i, "folder": evil}
        for i in (1, 2)
    ]
    for comparing in (False, True):
        if comparing:
            (root / "compare.json").write_text(json.dumps({"task": evil, "reference": evil, "rows": rows}))
        text = Path(report([root, train])["report"]).read_text()
        assert "<script" not in text
        page = Page(text)
        assert "script" not in page.tags and page.addresses == ["data:,", "#s0", "#s1"] and evil in page.words


@pytest.mark.parametrize("parent", ["x" * 300, "x" * 5000, "../" + "y" * 300, "/" + "z/" * 3000, "a\0b", "../" * 2000])
def test_a_parent_that_is_no_path_does_not_stop_the_report(run: Path, parent: str) -> None:
    for name in ("parent", "base"):
        stage(run / "odd" / name, "merge", "gone", {})
        edit(run / "odd" / name, **{name: parent})
    assert "no path" in report([run])["notes"] and "train" in Page((run / "report.html").read_text()).words


def test_samples_show_each_pattern_once_before_more_of_the_same(run: Path) -> None:
    found = facts.samples(read_section(run, "run"), limit=3)
    # Q0 and Q2: wrong then right (twice, so first); Q1: both right; Q3: both wrong; then Q2.
    assert [prompt for prompt, *_ in found] == ["Q0", "Q1", "Q3"]
    assert found[0][1:] == ("1", [("sparsify", "0", False), ("merge", "1", True)])
    assert [prompt for prompt, *_ in facts.samples(read_section(run, "run"), limit=9)] == ["Q0", "Q1", "Q3", "Q2"]


def names_of(section: Section) -> list[str]:
    """The models in the chart of score over size."""
    return [series.name for series in figures.score_over_size([section])[0].chart.series if series.name]


def comparison(root: Path, rows: list[dict]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "compare.json").write_text(json.dumps({"task": "sums", "rows": rows}))
    return root


def test_a_comparison(run: Path, capsys) -> None:
    rows = [
        {"name": "lora", "method": "LoRA", "mergeable": False, "precision": "FP32", "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6],
         "sparsity": 0.5, "sparsity_kept": None, "size": 2e6, "trainable_parameters": 10},
        {"method": "SparsePEFT", "mergeable": True, "accuracy": 0.48, "size": 1e6, "sparsity_kept": 1.0,
         "difference_ci95": [-0.05, 0.01], "evaluation": "evaluate/merge"},
        {"method": "<b>new</b>", "mergeable": None, "accuracy": None, "size": float("nan")},
        {},
    ]  # fmt: skip
    comparison(run, rows)
    section = read_section(run, "cmp")
    assert facts.verdict(section) == (
        "**SparsePEFT**: **48.0 %** on sums, one 100.0 % sparse model of 1.0 MB; LoRA has 50.0 % "
        "(paired difference -5.0 to +1.0 points, 95 %)."
    )
    cells = facts.method_table(section).cells()
    assert cells[0][:6] == ["LoRA", "50 %", "no", "FP32", "50.0 % (40.0 - 60.0 %)", "-"]
    assert cells[1][5] == "-5.0 to +1.0" and cells[2][0] == "<b>new</b>" and cells[3] == ["?", *["-"] * 11]
    assert names_of(section) == ["LoRA", "SparsePEFT"]
    assert [name for name, _, _ in facts.samples(section)[0][2]] == ["SparsePEFT"]
    assert cli.main(["report", str(run), "--out", str(run / "x.html")]) == 0
    assert "sections                 1" in capsys.readouterr().out
    page = Page((run / "x.html").read_text())
    assert "Methods" in page.words and "<b>new</b>" in page.words


def test_a_comparison_alone_and_several_folders(run: Path, tmp_path: Path) -> None:
    alone = comparison(tmp_path / "alone" / "run", [{"method": "LoRA", "accuracy": 0.5, "size": 3}])
    result = report([run, alone, run], tmp_path / "new" / "both.html")
    assert result["sections"] == 2 and (tmp_path / "new" / "both.md").is_file()
    page = Page((tmp_path / "new" / "both.html").read_text())
    assert str(run) in page.words and str(alone) in page.words  # equal names: whole paths
    assert page.addresses == ["data:,", "#s0", "#s1"]


def test_broken_files_become_notes(run: Path, capsys) -> None:
    stage(run / "extra", "search", "../sparsify", {"super_adapter": "../train", "trial": 1})
    (run / "extra" / "search.json").write_text("{")
    (run / "train" / "training_log.jsonl").write_text('{"loss": 1')
    (run / "evaluate" / "merge" / "predictions.jsonl").write_text("[]\n{}\nx")
    (run / "compare.json").write_text("[1,")
    for name, text in (
        ("a", "{"),
        ("b", '{"stage": 1}'),
        ("c", '{"stage": "merge", "metrics": []}'),
        ("d", '{"x": 1}'),
    ):
        (run / name).mkdir()
        (run / name / "sqft.json").write_text(text)
    assert cli.main(["report", str(run)]) == 0
    notes = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("notes"))
    for name in ("extra/search.json", "training_log.jsonl", "predictions.jsonl", "compare.json", "a/sqft.json", "b/sqft.json",
                 "c/sqft.json", "d/sqft.json"):  # fmt: skip
        assert f"{name} is corrupt" in notes, name
    assert "Training" not in Page((run / "report.html").read_text()).words


def test_numbers_that_are_none(run: Path) -> None:
    """A manifest's numbers may be anything: the page says '-'."""
    metrics = {"sparsity": "half", "zeros_kept": None, "by_module": {"model.layers.0.x": "a"}, "pruned": True, "seconds": 10**400,
               "filled": 1, "ranks": [1], "super_adapter": 5, "parameters": float("inf")}  # fmt: skip
    for kind in ("sparsify", "quantize", "train", "search", "merge", "save", "unheard-of"):
        stage(run / "odd" / kind, kind, "gone", metrics, {"first": 3, "method": ["x"], "limit": float("inf")})
    (run / "odd" / "search" / "search.json").write_text(json.dumps({"points": [
        {"number": i, "ranks": {}, "score": score, "cost": 1.0} for i, score in enumerate((1.0, None, float("nan"), 2.0))]}))  # fmt: skip
    stage(run / "odd" / "evaluate", "evaluate", None, {"task": 5, "accuracy": 1.5, "accuracy_ci95": [0]})
    report([run])
    words = Page((run / "report.html").read_text()).words
    assert "odd/sparsify" in words and "odd/merge" in words
    assert not {"half", "inf", "nan"} & {part.lower() for word in words for part in word.split()}
    rows = [line for line in (run / "report.md").read_text().splitlines() if line.startswith("| odd/sparsify |")]
    assert rows and set(rows[0].replace("odd/sparsify", "").split()) == {"|", "-"}, rows


def test_an_accuracy_of_150_percent_is_no_accuracy(run: Path) -> None:
    """A share that does not lie between 0 and 1 is missing, with its interval; a pair is an interval of its own kind."""
    metrics = {"task": "sums", "accuracy": 1.5, "accuracy_ci95": [1.4, 1.6], "perplexity": 9.5, "zeros_kept": -0.5}
    assert numbers(metrics) == {"perplexity": 9.5}
    assert numbers({"a": [1, 2], "a_ci95": [1, 2], "b_ci95": 1, "c_ci95": [1, float("nan")], "d": 10**400}) == {
        "a_ci95": (1, 2)
    }
    stage(run / "odd" / "evaluate", "evaluate", "../../train", metrics)
    comparison(run / "odd", [{"name": "lora", "method": "LoRA", "accuracy": 1.5, "size": 3}])
    for folder in (run, run / "odd"):
        words = Page(Path(report([folder])["report"]).read_text()).words
        assert not any("150.0" in word or "140.0" in word for word in words)
    assert "9.50" in Path(report([run])["markdown"]).read_text()


def test_brackets_in_data_are_no_markup(capsys) -> None:
    """rich reads [INST] and [/INST] as markup: they vanish, or end in an error."""
    table = Table([Column("[/b] of", "a"), Column("c", "c")], [{"a": "[INST] {q} [/INST]", "c": "[red]x"}])
    table.show()
    out = capsys.readouterr().out
    assert "[INST] {q} [/INST]" in out and "[/b] of" in out and "[red]x" in out
    assert "| a\\|&lt;b> |" in Table([Column("x", "x")], [{"x": "a|<b>"}]).markdown()


def test_listing_stages_loads_no_torch(run: Path) -> None:
    code = f"import sys; from sqft import cli; assert cli.main(['ls', {str(run)!r}]) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zeros kept 100.000 %" in done.stdout


def test_errors(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "sqft.json").write_text("{")
    (tmp_path / "file").write_text("")
    for code, message, arguments in (
        (2, "there is no folder", [tmp_path / "none"]),
        (2, "was written by sqft", [tmp_path / "empty"]),
        (1, "is corrupt", [tmp_path / "bad"]),
        (2, "ends in .html", [run, "--out", tmp_path / "x.txt"]),
        (2, "is a folder", [run, "--out", tmp_path / "d.html"]),
        (1, "cannot write", [run, "--out", tmp_path / "file" / "x.html"]),
        (2, "FOLDER", []),
    ):
        (tmp_path / "d.html").mkdir(exist_ok=True)
        assert cli.main(["report", *map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("x.*"))


def test_the_search_is_between_its_super_adapter_and_the_merge(tmp_path: Path) -> None:
    stage(tmp_path / "base", "quantize")
    stage(tmp_path / "train", "train", "../base")
    stage(tmp_path / "found", "search", "../train", {}, to_dict(SearchConfig(task="arithmetic")))
    stage(tmp_path / "merged", "merge", "../found")
    section = read_section(tmp_path, "x")
    assert [s.name for s in section.lineage(section.stages[-1])] == ["merged", "found", "train", "base"]
    text = Path(report([tmp_path])["markdown"]).read_text()
    assert f"sqft search {tmp_path}/train {tmp_path}/found --task arithmetic\n" in text


def test_an_unknown_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        report([tmp_path / "x"])


def test_a_comparison_at_several_sparsities(tmp_path: Path) -> None:
    rows = [{"name": name, "method": name.upper(), "sparsity": sparsity, "mergeable": merges, "accuracy": accuracy, "size": 10}
            for name, sparsity, merges, accuracy in (("dense", None, None, 0.9), ("sqft", 0.3, False, 0.5), ("qa", 0.3, True, 0.6),
                                                     ("sqft", 0.5, False, 0.4), ("qa", 0.5, True, 0.3))]  # fmt: skip
    root = comparison(tmp_path, rows)
    (root / "compare.json").write_text(json.dumps({"rows": rows, "reference": "sqft"}))
    section = read_section(root, "x")
    assert [row[:2] for row in facts.method_table(section).cells()][:2] == [["DENSE", "-"], ["SQFT", "30 %"]]
    names = ["DENSE", "SQFT, 30 %", "QA, 30 %", "SQFT, 50 %", "QA, 50 %"]
    assert names_of(section) == names
    assert facts.method_table(section).columns[5].title == "points to SQFT (95 %)"
    said = facts.verdict(section)
    assert said.startswith("**QA, 30 %**: ") and "; SQFT, 30 % has 50.0 %" in said
