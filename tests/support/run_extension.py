"""Runs what tests/support/extension adds, by its names alone; prints each name when it has worked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import torch
from pico import pico_folder, pico_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import sqft
from sqft import cli
from sqft.formats.checkpoint import packed_layers
from sqft.registry import KERNELS
from sqft.sparsity.masks import collect_masks

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
TRAIN = {"task": "parity", "max_steps": 3, "batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.02}


def refit(work: Path) -> None:
    dense = work / "dense"
    sqft.sparsify(dense, sqft.SparsifyConfig(method="refit", pattern="2:4"), out=work / "refit")
    weights = [
        load_file(work / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] for name in ("dense", "refit")
    ]
    assert (weights[1].view(-1, 4) != 0).sum(1).max() == 2
    torch.testing.assert_close(weights[0].abs().sum(1), weights[1].abs().sum(1))


def fisher(work: Path) -> None:
    metrics = sqft.sparsify(work / "dense", sqft.SparsifyConfig(method="fisher"), TOKENS, out=work / "fisher")
    assert metrics["sparsity"] == 0.5


def neox(work: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox_japanese", hidden_size=32, intermediate_multiple_size=2, num_hidden_layers=2,
                                  num_attention_heads=4, vocab_size=260, max_position_embeddings=512)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "neox")
    pico_tokenizer().save_pretrained(work / "neox")
    sqft.sparsify(work / "neox", sqft.SparsifyConfig(), TOKENS, out=work / "neox-sparse")
    sqft.quantize(work / "neox-sparse", sqft.QuantizeConfig(group_size=32), TOKENS, out=work / "neox-int4")
    for name, kind in (("neox-sparse", "sparse-peft"), ("neox-int4", "qa-sparse-peft")):
        sqft.train(work / name, sqft.TrainConfig(**TRAIN, adapter=kind), out=work / f"{name}-adapter")
        merged = sqft.merge(work / f"{name}-adapter", out=work / f"{name}-merged")
        assert merged["zeros_kept"] == 1.0 and merged["max_logit_difference"] < 1e-4
    assert len(collect_masks(sqft.load(work / "neox-sparse")[0])) == 8


def doubled(work: Path) -> None:
    sqft.train(work / "fisher", sqft.TrainConfig(**TRAIN, adapter="doubled"), out=work / "doubled")
    assert sqft.merge(work / "doubled", out=work / "doubled-merged")["zeros_kept"] == 1.0


def bytes_format(work: Path) -> None:
    sqft.quantize(work / "fisher", sqft.QuantizeConfig(group_size=32, format="bytes"), TOKENS, out=work / "int4")
    stored = load_file(work / "int4" / "model.safetensors")
    layer = packed_layers(sqft.load(work / "int4")[0])["model.layers.0.mlp.up_proj"]
    assert torch.equal(stored["model.layers.0.mlp.up_proj.bytes"], layer.integers())
    sqft.train(work / "int4", sqft.TrainConfig(**TRAIN, adapter="qa-sparse-peft"), out=work / "aware")
    assert sqft.merge(work / "aware", out=work / "aware-merged")["zeros_kept"] == 1.0
    assert "bytes" in (work / "aware-merged" / "config.json").read_text()


def numpy_exporter(work: Path) -> None:
    sqft.export(work / "doubled-merged", sqft.ExportConfig(to="numpy"), out=work / "numpy")
    up = numpy.load(work / "numpy" / "model.layers.0.mlp.up_proj.weight.npy")
    assert (
        up == load_file(work / "doubled-merged" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    ).all()


def plain_runtime(work: Path) -> None:
    config = sqft.BenchConfig(runtimes=["plain"], prompt=[4], tokens=2, rounds=1)
    (row,) = sqft.bench([work / "dense"], config, out=work / "bench", say=lambda _: None)
    assert row["cases"][0]["decode_per_second"] > 0


def whole_kernel(work: Path) -> None:
    before = len(KERNELS["masked_weight.cpu"].__globals__["CALLS"])
    sqft.train(work / "fisher", sqft.TrainConfig(**TRAIN), out=work / "masked")
    assert sqft.merge(work / "masked", out=work / "masked-merged")["max_logit_difference"] == 0.0
    assert len(KERNELS["masked_weight.cpu"].__globals__["CALLS"]) > before + 10


def parity(work: Path) -> None:
    arguments = [
        "evaluate",
        str(work / "masked-merged"),
        "--task",
        "parity",
        "--limit",
        "4",
        "--out",
        str(work / "score"),
    ]
    stdout, sys.stdout = sys.stdout, sys.stderr
    code = cli.main(arguments)
    sys.stdout = stdout
    assert code == 0 and len((work / "score" / "predictions.jsonl").read_text().splitlines()) == 4


STEPS = {
    "refit": refit, "fisher": fisher, "gpt_neox_japanese": neox, "doubled": doubled, "bytes": bytes_format, "numpy": numpy_exporter,
    "plain": plain_runtime, "masked_weight.cpu": whole_kernel, "parity": parity,
}  # fmt: skip


def main(work: Path) -> None:
    pico_folder(work / "dense")
    for name, step in STEPS.items():
        step(work)
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
