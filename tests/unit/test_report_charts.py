"""What ``sqft report`` counts in weights, and how it draws."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import sqft
from sqft import artifact, drawing
from sqft.config import QuantizeConfig
from sqft.measuring.weights import WeightFolder, chosen, count_levels, count_values
from sqft.reporting.collect import read_section, serving_bytes
from sqft.reporting.figures import heat_map
from sqft.reporting.page import report


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, QuantizeConfig(group_size=32), tokens, out=out)
    return out


def test_counts_of_integer_levels_are_those_of_the_model(packed: Path) -> None:
    folder = WeightFolder(packed)
    counts = count_levels(folder, list(folder.sizes))
    model, _ = sqft.load(packed)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert set(layers) == set(folder.sizes)
    assert counts.total == sum(folder.sizes.values()) == sum(m.in_features * m.out_features for m in layers.values())
    metrics = artifact.read_manifest(packed).metrics
    assert counts.pruned == metrics["pruned"]
    assert metrics["zeros"] == counts.pruned + counts.kept[0.0]
    with pytest.raises(sqft.SqftError, match="cannot be read"):
        WeightFolder(packed / "masks")


def test_counts_of_float_weights(dense: Path, sparse: Path) -> None:
    before, after = WeightFolder(dense), WeightFolder(sparse)
    names = list(before.sizes)
    all_of, half = count_values(before, names, 0.5), count_values(after, names, 0.5)
    assert all_of.total == half.total == sum(before.sizes.values()) and all_of.pruned == 0
    assert half.pruned == artifact.read_manifest(sparse).metrics["zeros"]
    narrow = count_values(before, names, 0.01)
    assert narrow.total == all_of.total and narrow.kept[max(narrow.kept)] > all_of.kept[max(all_of.kept)]
    assert not any("norm" in name for name in names)


def test_a_large_model_is_sampled_evenly() -> None:
    sizes = {f"{i}": 10 for i in range(100)}
    assert len(chosen(sizes, 1000)) == 100 and chosen(sizes, 1) == ["0"]
    some = chosen(sizes, 250)
    assert len(some) == 25 and {int(b) - int(a) for a, b in itertools.pairwise(some)} == {4}


def test_weights_and_sizes_of_real_folders(
    dense: Path, sparse: Path, packed: Path, trained: Path, tmp_path: Path
) -> None:
    for name, folder in (("sparse", sparse), ("packed", packed), ("adapter", trained)):
        shutil.copytree(folder, tmp_path / name)
        manifest = artifact.read_manifest(tmp_path / name)
        parent = str(dense) if name == "sparse" else "../sparse"
        (tmp_path / name / "sqft.json").write_text(json.dumps(vars(replace(manifest, parent=parent))))
    section = read_section(tmp_path, "x")
    sizes = {s.name: serving_bytes(s, section) for s in section.stages}
    assert sizes["sparse"] == (sparse / "model.safetensors").stat().st_size  # without masks
    assert sizes["adapter"] == sizes["sparse"] + (trained / "adapter_model.safetensors").stat().st_size
    report([tmp_path])
    page = (tmp_path / "report.html").read_text()
    assert "INT4 grid: packed" in page and "Float: model to sparse" in page
    weights = tmp_path / "packed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in report([tmp_path])["notes"]


def test_axes_and_labels() -> None:
    axis = drawing.make_axis("", [0.0, 1.0], margin=0)
    assert axis.ticks == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))
    assert list(drawing.make_axis("", [1, 9], whole=True, margin=0).ticks) == [2, 4, 6, 8]
    make = drawing.make_axis
    assert make("", [0.9, 0.99], limits=(0, 1)).high < make("", [0.9, 1.0], limits=(0, 1)).high == 1
    for values in ([3.0], [0.0], [-1e-9, 1e-9], [1e12, 2e12], [1.5, 1.5]):
        axis = drawing.make_axis("", values, limits=(0, 1))
        assert axis.low < axis.high and axis.ticks
    # Labels of points that lie on each other do not, and hostile ones are text.
    marks = [drawing.Mark(f'<b>{i}</b> & "', 1.0, 1.0, i) for i in range(17)]
    axis = make("", [1.0])
    chart = drawing.Chart('a "chart"', axis, axis, marks=marks, keys=[("c0", "<i>"), ("ring c1", "chosen")])
    names = [t for t in ElementTree.fromstring(drawing.draw(chart, 1060, 380)).iter("text") if t.get("class") == "name"]
    assert len({(t.get("x"), t.get("y")) for t in names}) == len(names) == 17 and names[0].text == '<b>0</b> & "'
    alone = ElementTree.fromstring(drawing.standalone(chart))
    assert "<i>" in [t.text for t in alone.iter("{http://www.w3.org/2000/svg}text")]
    assert "var(" not in drawing.standalone(chart)


def test_heat_map_and_histogram() -> None:
    values = {"model.layers.1.mlp.up": 0.5, "model.layers.0.mlp.up": 0.1, "lm_head": 1.0, "3.qkv": 8, "4": 2}
    (heat,) = heat_map("x", values, 1, lambda v: f"{v:.2f}<")
    assert heat.layers == [0, 1, 3, 4] and [name for name, _, _ in heat.rows] == ["mlp.up", "qkv", "all"]
    assert heat_map("x", {"lm_head": 1.0}, 1, str) == []
    assert heat.rows[0][1:] == (
        [("layer 0, mlp.up: 0.10<", 0.154), ("layer 1, mlp.up: 0.50<", 0.53), None, None],
        "0.30<",
    )
    bars = [drawing.Bars("a", {float(i): 0.1 for i in range(-3, 4)}, 0.5, 0), drawing.Bars("b", {0.0: 0.2}, 0.0, 1)]
    drawn = ElementTree.fromstring(drawing.draw(drawing.histogram(bars, "x", str, "x")))
    tips = [t.text for t in drawn.iter("title")]
    assert tips == ["a", "a: 50.00 % of the weights are pruned", "b"]
