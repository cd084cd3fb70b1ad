"""What ``sqft report`` counts in weights, and how it draws."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.manifest import edit

import sqft
from sqft import artifact, drawing
from sqft.config import QuantizeConfig
from sqft.measuring import weights
from sqft.measuring.weights import WeightFolder, histograms
from sqft.reporting.collect import read_section
from sqft.reporting.figures import before_and_after, heat_map
from sqft.reporting.page import report
from sqft.searching.picking import Evaluated
from sqft.searching.plots import plots


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, QuantizeConfig(group_size=32), tokens, out=out)
    return out


def test_counts_of_integer_levels_are_those_of_the_model(packed: Path) -> None:
    folder = WeightFolder(packed)
    (found,) = histograms([folder])
    model, _ = sqft.load(packed)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert {name: m.in_features * m.out_features for name, m in layers.items()} == folder.sizes
    total, metrics = sum(folder.sizes.values()), artifact.read_manifest(packed).metrics
    assert found.matrices == len(layers) and found.pruned * total == pytest.approx(100 * metrics["pruned"])
    assert found.pruned + sum(share for _, share in found.outline) == pytest.approx(100)
    kept_zeros = dict(found.outline[1:])[-0.5]
    assert kept_zeros * total == pytest.approx(100 * (metrics["zeros"] - metrics["pruned"]))
    ones = sum(
        int((m.integers().int() - m.grid().zero_OG[:, m.g_idx.long()].int() == 1).sum()) for m in layers.values()
    )
    assert dict(found.outline)[0.5] * total == pytest.approx(100 * ones) and ones > 0
    assert [edge for edge, _ in found.outline] == [-15.5, *(level - 0.5 for level in range(-15, 17))]
    with pytest.raises(sqft.SqftError, match="has no model.safetensors"):
        WeightFolder(packed / "masks")


def test_counts_of_float_weights(dense: Path, sparse: Path) -> None:
    folders = [WeightFolder(dense), WeightFolder(sparse)]
    assert not any("norm" in name or "embed" in name for name in folders[0].sizes)
    before, after = histograms(folders)
    total, zeros = sum(folders[0].sizes.values()), artifact.read_manifest(sparse).metrics["zeros"]
    assert before.pruned == 0 and after.pruned * total == pytest.approx(100 * zeros) and zeros > 0
    for one in (before, after):
        assert one.pruned + sum(share for _, share in one.outline) == pytest.approx(100)
    model, _ = sqft.load(dense)
    values = torch.cat([model.get_submodule(name).weight.detach().flatten() for name in folders[0].sizes])
    outside = before.outline[-2][0]  # where the outermost range begins, of what lies beyond as well
    assert before.outline[-2][1] * total == pytest.approx(100 * int((values > outside).sum()), abs=300)
    assert outside == pytest.approx(4 * float(values.std()), rel=0.05)
    assert before.outline[0][1] == before.outline[-1][1] == 0


def test_weights_that_are_no_numbers_are_an_error(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "nan")
    tensors = {
        name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(dense / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sqft.SqftError, match="no finite numbers"):
        histograms([WeightFolder(tmp_path / "nan")])


def test_a_large_model_is_sampled(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WeightFolder(dense)
    read: list[str] = []
    monkeypatch.setattr(weights, "BUDGET", sum(folder.sizes.values()) // 2)
    monkeypatch.setattr(folder, "read", lambda name, read_one=folder.read: read.append(name) or read_one(name))
    (found,) = histograms([folder])
    names = set(read)
    assert found.matrices == len(names) == len(folder.sizes) // 2 > 1
    assert {name.split(".")[2] for name in names} == {name.split(".")[2] for name in folder.sizes}  # of all layers
    assert histograms([folder]) == [found]  # the same ones again
    monkeypatch.setattr(weights, "BUDGET", 1)
    assert histograms([folder])[0].matrices == 1


def test_weights_and_sizes_of_real_folders(
    dense: Path, sparse: Path, packed: Path, trained: Path, tmp_path: Path
) -> None:
    for name, folder in (("sparse", sparse), ("packed", packed), ("adapter", trained)):
        shutil.copytree(folder, tmp_path / name)
        parent = str(dense) if name == "sparse" else "../sparse"
        edit(tmp_path / name, parent=parent)
    section = read_section(tmp_path, "x")
    sizes = {s.name: section.serving_bytes(s) for s in section.stages}
    assert sizes["sparse"] == (sparse / "model.safetensors").stat().st_size  # without masks
    assert sizes["adapter"] == sizes["sparse"] + (trained / "adapter_model.safetensors").stat().st_size
    report([tmp_path])
    page = (tmp_path / "report.html").read_text()
    assert "INT4 grid: packed" in page and "Float: model (start) to sparse" in page
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "corrupt or truncated" in report([tmp_path])["notes"]


def test_axes() -> None:
    make = drawing.make_axis
    axis = make([0.0, 1.0])
    assert axis.low == 0 and axis.high == pytest.approx(1.1)
    assert list(axis.ticks.values()) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert list(make([1, 4]).ticks.values()) == ["1", "2", "3", "4"]  # no halves of what is counted
    assert make([1.0, 9.0]).low > 0 and make([0.1, 9.0]).low == 0 and make([-1.0, 9.0]).low < -1
    assert list(make([0, 30000]).ticks.values()) == ["0", "10000", "20000", "30000"]
    for values in ([3.0], [0.0], [3], [0], [-1e-9, 1e-9], [1e12, 2e12], [1.5, 1.5], [-2.0, -2.0]):
        axis = make(values)
        assert axis.low < axis.high and axis.ticks
        assert all(axis.low <= value <= axis.high for value in [*values, *axis.ticks])


@pytest.mark.parametrize(("width", "count"), [(372, 14), (1060, 17)])
def test_names_keep_off_each_other_and_are_text(width: int, count: int) -> None:
    """Of points that lie on each other, with hostile names."""
    series = [
        drawing.Series([(1.0, 1.0)], i, "dot", name=f'<b>{i}</b> & "', key="<i>" if i % 2 else "a")
        for i in range(count)
    ]
    chart = drawing.Chart('a "chart"', "x", "y", series)
    root = ElementTree.fromstring(drawing.draw(chart, width, 380))
    names = [t for t in root.iter("text") if t.get("class") == "name"]
    assert root.get("role") == "img" and root.get("aria-label") == 'a "chart"' and names[0].text == '<b>0</b> & "'
    assert len(names) == count
    boxes = []
    for name in names:
        wide, x, y = len(str(name.text)) * drawing.LETTER, float(name.get("x", "")), float(name.get("y", ""))
        left = x if name.get("text-anchor") == "start" else x - wide
        assert left >= 0 and left + wide <= width and 0 < y < 380
        assert not any(abs(left - a) < wide and abs(y - b) < 12 for a, b in boxes)
        boxes.append((left, y))
    alone = ElementTree.fromstring(drawing.standalone(chart))
    assert "<i>" in [t.text for t in alone.iter("{http://www.w3.org/2000/svg}text")]
    assert "var(" not in drawing.standalone(chart)


def test_every_kind_of_series_is_drawn_inside_the_chart() -> None:
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]
    kinds = ("line", "dashed", "whisker", "step", "area", "pale", "dot", "square")
    series = [drawing.Series(points, i, kind, tip=kind) for i, kind in enumerate(kinds)]
    drawn = ElementTree.fromstring(drawing.draw(drawing.Chart("x", "x", "y", series)))
    paths = [path for path in drawn.iter("path") if path.find("title") is not None]
    assert len(paths) == 6 + 2 * len(points)
    assert {path.get("class", "").split()[0] for path in paths} == {*kinds[:6], "mark"}
    for path in paths[:6]:
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", ""))]
        assert all(0 <= x <= 460 and 0 <= y <= 280 for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    corners = {path.get("class", "").split()[0]: path.get("d", "").count("L") for path in paths}
    assert corners["step"] == corners["area"] == 4 and corners["line"] == 2
    single = ElementTree.fromstring(
        drawing.draw(drawing.Chart("x", "x", "y", [drawing.Series([(1, 2.0)], 0, tip="one")]))
    )
    assert [path.get("class") for path in single.iter("path") if path.find("title") is not None] == ["mark c0"]


def test_heat_map() -> None:
    values = {"model.layers.1.mlp.up": 0.5, "model.layers.0.mlp.up": 0.1, "lm_head": 1.0, "3.qkv": 8, "4": 2}
    (heat,) = heat_map("x", values, lambda v: f"{v:.2f}<")
    assert heat.rows == {"mlp.up": {1: 0.5, 0: 0.1}, "qkv": {3: 8}, "all": {4: 2}} and heat.darkest == 8
    assert heat_map("x", {"lm_head": 1.0}, str) == []


def test_heat_map_on_the_page(tmp_path: Path) -> None:
    by_module = {"model.layers.1.mlp.up": 0.5, "model.layers.0.mlp.up": 0.1, "model.layers.0.<b>": 0.25}
    (tmp_path / "a").mkdir()
    artifact.write_manifest(tmp_path / "a", artifact.Manifest(stage="sparsify", metrics={"by_module": by_module}))
    page = Path(report([tmp_path])["report"]).read_text()
    heat = page[page.index('<div class="heat"') : page.index("10.000 % to 50.000 %; at the right")]
    cells = re.findall(r'<u (?:title="([^"]*)"\s+style="opacity: ([\d.]+)"|class="none")></u>', heat)
    assert cells == [("layer 0, mlp.up: 10.000 %", "0.154"), ("layer 1, mlp.up: 50.000 %", "0.53"),
                     ("layer 0, &lt;b&gt;: 25.000 %", "0.295"), ("", "")]  # fmt: skip
    assert "--n: 2" in heat and "<b>30.000 %</b>" in heat and "<b>&lt;b&gt;</b>" in heat


def test_before_and_after(dense: Path, sparse: Path, packed: Path) -> None:
    figure = before_and_after({"a": WeightFolder(dense), "b<": WeightFolder(sparse)})
    assert figure.title == "Float: a to b<" and figure.chart is not None
    drawn = ElementTree.fromstring(drawing.draw(figure.chart))
    tips = [title.text for title in drawn.iter("title")]
    assert tips == ["a", "b<", "b<: 50.00 % pruned (pale, cut off)"] and tips[-1] in figure.note
    assert before_and_after({"c": WeightFolder(packed)}).title == "INT4 grid: c"


def test_a_search_marks_what_was_tried_and_chosen() -> None:
    trials = [Evaluated(i, {}, score, cost, kind) for i, (score, cost, kind) in
              enumerate([(0.2, 1e6, "minimal"), (0.5, 3e6, "maximal"), (0.4, 2e6, "")])]  # fmt: skip
    progress, pareto = plots(trials, 1, "accuracy", "parameters").values()
    assert progress.series[0].points == [(1, 0.2), (2, 0.5), (3, 0.5)] and progress.series[0].kind == "step"
    assert pareto.series[0].points == [(1, 0.2), (2, 0.4), (3, 0.5)] and pareto.x.endswith("millions")
    for chart in (progress, pareto):
        assert [mark.name for mark in chart.series[1:]] == [
            "minimal",
            "",
            "maximal, chosen",
        ]  # the chosen one is on top
        assert [mark.key for mark in chart.series[1:]] == ["", "tried", "chosen"]
        assert len({mark.colour for mark in chart.series}) == 4
    assert [mark.points[0][0] for mark in plots(trials, None, "loss", "latency")["pareto"].series[1:]] == [
        1e6,
        3e6,
        2e6,
    ]
