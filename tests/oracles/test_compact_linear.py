"""Products of the compact form: every variant of the kernel against float64, over shapes, patterns, grids and tails."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pico import pico_model
from support.rounding import of_16_bits
from torch import Tensor

import sqft
from sqft.errors import Note
from sqft.kernels import compact
from sqft.kernels.compact import CompactWeight, pack, starts
from sqft.kernels.cpu import library
from sqft.kernels.packed import pack_mask
from sqft.serving.decoder import Decoder
from sqft.serving.layers import CompactLinear, Int4Linear
from sqft.serving.prepare import prepare

PATTERNS = ("free", "crowded", "32:64", "holes", "full", "empty")
INTEGERS = tuple(product((4, 8), ((7, 192, 64), (5, 96, 32), (3, 64, 32), (9, 256, 128), (33, 576, 576), (5, 160, 32))))
HALVES = tuple(product((torch.float16, torch.bfloat16), ((7, 192), (3, 64), (5, 70), (2, 8), (33, 576))))


def mask_of(pattern: str, rows: int, columns: int) -> Tensor:
    mask = torch.rand(rows, columns) < (0.96 if pattern == "crowded" else 0.5)  # of which 16 in a row begin in mid-byte
    if pattern == "32:64" and columns % 64 == 0:
        mask = (torch.rand(rows, columns // 64, 64).argsort(-1) < 32).view(rows, columns)
    if pattern == "holes":
        mask[:, :64], mask[rows // 2] = False, False
    return torch.ones_like(mask) if pattern == "full" else torch.zeros_like(mask) if pattern == "empty" else mask


def integers(bits: int, rows: int, columns: int, group: int, pattern: str) -> tuple[CompactWeight, Tensor]:
    """A weight, and what it means in float64."""
    mask, groups = mask_of(pattern, rows, columns), columns // group
    q = torch.randint(0, 2**bits, (rows, columns)).to(torch.uint8)
    scale, zero = torch.rand(rows, groups) + 0.1, torch.randint(0, 2**bits, (rows, groups)).to(torch.uint8)
    meant = (q.double() - zero.repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1) * mask
    made = pack(q, pack_mask(mask), bits)
    return CompactWeight(made, starts(made), scale, zero, group), meant


def floats(dtype: torch.dtype, rows: int, columns: int, pattern: str) -> tuple[CompactWeight, Tensor]:
    w = (torch.randn(rows, columns) * mask_of(pattern, rows, columns)).to(dtype)
    made = pack(w, pack_mask(w != 0))
    return CompactWeight(made, starts(made), torch.zeros(0), torch.zeros(0, dtype=torch.uint8)), w.double()


def check(weight: CompactWeight, meant: Tensor, tokens: int, variant: int) -> None:
    x = torch.randn(tokens, meant.shape[1]) * torch.logspace(-2, 2, meant.shape[1])
    wanted, size = x.double() @ meant.T, x.double().abs() @ meant.abs().T
    allowed = 1e-6 * size
    wide = weight.compact.bits == 4 and weight.group % 64 == 0
    if weight.compact.bits and variant >= library.VARIANTS.index(
        "avx2" if wide else "avx512"
    ):  # x is rounded to 16 bits
        allowed += of_16_bits(x, meant)
    found = library.run(x, weight, variant)
    assert bool(((found - wanted).abs() <= allowed).all())
    assert torch.allclose(compact.linear(x, weight).double(), wanted, rtol=1e-4, atol=1e-5 * float(size.max()))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if not library.library():
        pytest.skip("no C++ compiler: the reference computes, which other tests compare")


@pytest.mark.parametrize("variant", range(len(library.VARIANTS)), ids=library.VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_variants_compute_what_the_weight_means(variant: int, pattern: str) -> None:
    if variant > library.variant():
        pytest.skip("this processor lacks the instructions")
    torch.manual_seed(variant)
    for bits, (rows, columns, group) in INTEGERS:
        weight, meant = integers(bits, rows, columns, group, pattern)
        for tokens in (1, 2, 3, 8, 13):
            check(weight, meant, tokens, variant)
    for dtype, (rows, columns) in HALVES:
        weight, meant = floats(dtype, rows, columns, pattern)
        for tokens in (1, 2, 3, 8, 13):
            check(weight, meant, tokens, variant)


def test_values_may_lie_anywhere_in_memory() -> None:
    """A mapped file aligns them to nothing in particular, and ends where it ends."""
    weight, meant = integers(4, 7, 192, 64, "free")
    for shift in range(1, 5):
        moved = torch.cat([torch.zeros(shift, dtype=torch.uint8), weight.compact.values])[shift:]
        placed = weight._replace(compact=weight.compact._replace(values=moved))
        for variant in range(library.variant() + 1):
            check(placed, meant, 2, variant)


def test_the_kernel_refuses_what_does_not_fit() -> None:
    weight, _ = integers(4, 7, 192, 64, "free")
    for wrong in (weight._replace(compact=weight.compact._replace(values=weight.compact.values[1:])),
                  weight._replace(starts=weight.starts[1:])):  # fmt: skip
        with pytest.raises(RuntimeError, match="do not fit|not contiguous"):
            library.run(torch.randn(1, 192), wrong, 0)
    with pytest.raises(RuntimeError, match="lacks what the variant needs"):
        library.run(torch.randn(1, 192), weight, 7)


def compressed(symmetric: bool, bits: int = 4, sparse: bool = True) -> Any:
    model = pico_model("qwen2", hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    if sparse:
        sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32, bits=bits, symmetric=symmetric))
    return model


@pytest.mark.parametrize(("symmetric", "bits", "sparse", "kind", "error"),
                         [(True, 4, True, "CompactLinear", 2e-3), (False, 4, True, "CompactLinear", 2e-3),
                          (False, 8, True, "CompactLinear", 2e-3), (False, 4, False, "CompactLinear", 2e-3),
                          (False, 2, True, "Linear", 1e-5)])  # fmt: skip
def test_a_prepared_model_answers_the_same(symmetric: bool, bits: int, sparse: bool, kind: str, error: float,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("sqft.kernels.cpu.library.FEW_TOKENS", 32)
    tokens = torch.arange(40)[None] % 250
    wanted = compressed(symmetric, bits, sparse)(tokens).logits.detach()
    model = compressed(symmetric, bits, sparse)
    assert prepare(model) == {kind: 15 if kind == "CompactLinear" else 14}  # with the head
    for length in (1, 7, 40):  # by the kernel, and by one product of the decoded weight
        found = model(tokens[:, :length]).logits.detach()
        assert float((found - wanted[:, :length]).abs().max()) <= error * float(wanted.abs().max()), length


def test_a_sparse_half_precision_model_is_prepared() -> None:
    model = pico_model(dtype=torch.float16, hidden_size=64, intermediate_size=128)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    made = CompactLinear.from_float(layer.weight, sqft.models.weights.Weight("", layer).packed_mask, None)
    assert torch.allclose(made(x), F.linear(x, layer.weight.float()), atol=1e-5)
    assert prepare(model)["CompactLinear"] == 15
    assert model.lm_head.values.dtype == torch.float16 and model.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("bits", [0, 4])
def test_the_decoder_goes_on_where_transformers_stops(family: str, bits: int) -> None:
    """Token by token its logits are those of one forward pass of the same prepared model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "sliding_window": None}
    model: Any = pico_model(family, torch.float32 if bits else torch.float16, **sizes)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    if bits:
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32, bits=bits))
    assert not Decoder.takes(model)
    prepare(model)
    assert Decoder.takes(model)
    tokens = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    wanted = model(tokens).logits[0]
    decoder, size = Decoder(model), float(wanted.abs().max())
    row = tokens[0].tolist()
    assert float((decoder.read([row[:9]], 60)[0] - wanted[8]).abs().max()) < 1e-4 * size
    for position in range(9, 60):
        found = decoder.step([0], [row[position]], [position])[0]
        assert float((found - wanted[position]).abs().max()) < 1e-4 * size, position
    again = decoder.read([row[:20]], 5)[0]  # another prompt
    assert float((again - wanted[19]).abs().max()) < 1e-4 * size
    with pytest.raises(RuntimeError, match="reserve room"):
        decoder.step([0], [3], [25])
    with pytest.raises(RuntimeError, match="no such token"):
        decoder.step([0], [10**6], [20])
    with pytest.raises(RuntimeError, match="no such sequence"):
        decoder.step([1], [3], [20])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_decoder_goes_on_with_several_prompts(family: str) -> None:
    """Of other lengths, in one step: each has the logits that it has alone, also when one says no more."""
    model: Any = pico_model(family, torch.float32, hidden_size=64, intermediate_size=96)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    prepare(model)
    decoder, drawn = Decoder(model), torch.Generator().manual_seed(1)
    lengths = [3, 17, 9, 5, 12, 1, 20, 8, 2, 11]  # more than eight: two rounds of the kernels
    prompts = [torch.randint(0, 250, (length,), generator=drawn).tolist() for length in lengths]
    together = [dict(found) for found in decoder.generate(prompts, 12, lambda logits: int(logits.argmax()), set())]
    for row, prompt in enumerate(prompts):
        alone = list(decoder.generate([prompt], 12, lambda logits: int(logits.argmax()), set()))
        assert [found[row] for found in together] == [found[0] for found in alone]
    end = together[2][4]
    stopped = list(decoder.generate(prompts, 12, lambda logits: int(logits.argmax()), {end}))
    for row in range(len(prompts)):  # up to the first ``end``, and no more
        said = [found[row] for found in together]
        assert [found[row] for found in stopped if row in found] == said[: said.index(end) + 1 if end in said else 12]


def test_what_the_decoder_does_not_know_is_left_to_transformers() -> None:
    model: Any = pico_model("gemma2", torch.float16, hidden_size=64)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    prepare(model)
    assert not Decoder.takes(model)
    model = pico_model("mistral", torch.float16, hidden_size=64)  # its window slides
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    prepare(model)
    assert not Decoder.takes(model)


def test_without_kernels_plain_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight, meant = integers(4, 7, 192, 64, "free")
    monkeypatch.setattr(library, "SOURCE", tmp_path / "broken.cpp")
    (tmp_path / "broken.cpp").write_text("this is no C++\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    try:
        x = torch.randn(1, 192)
        with pytest.warns(Note, match=r"(?s)the C\+\+ kernels are not there.*error"):
            found = library.compact_linear(x, weight)
        assert torch.allclose(found.double(), x.double() @ meant.T, atol=1e-3)
        assert list((tmp_path / "sqft").iterdir()) == []
        library.library.cache_clear()
        monkeypatch.setenv("SQFT_CPU_KERNELS", "off")
        assert not library.library()
        model = compressed(True)
        assert prepare(model) == {"Int4Linear": 14}
        assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)
    finally:
        library.library.cache_clear()
