"""Estimates of a stage's time and memory from a model's sizes, before anything is loaded.

Time is work over speed: FLOPs of products and bytes moved, over what ``measure`` finds. ``docs/recipes.md`` compares it
with runs of SmolLM2-135M, on which the constants were measured; what took less than a tenth of every stage is left out.
A stage's function has its name and takes (the model, its options).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from sqft.calibration.statistics import is_paired
from sqft.config import EvaluateConfig, QuantizeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.kernels.dispatch import pick_device, product
from sqft.models.discover import Architecture, describe
from sqft.models.experts import shares_of_tokens
from sqft.planning.workload import Lengths, of_problems, of_text, of_training
from sqft.registry import KINDS, QUANTIZERS

# Bytes moved a weight, where a step is bound by memory.
CHOOSE, CLIP = 1600, 2200  # Wanda's choice; the search for ranges
BUILD = {False: 80, True: 190}  # a masked adapter's effective weight, on a float and on a packed base
UNPACK = 45
FACTORIZE = 8  # x I^3 FLOPs: two Cholesky factors and an inverse in float64, in float32's FLOPs
COLUMN = 5e-5  # seconds a column of GPTQ's loop, whatever its length
TOKEN = 1e-3  # seconds a layer and generated token, whatever its size: Python and launches
GGUF = 1.1e-7  # seconds a weight to de-quantize a GGUF file
START, PROCESS = 2.0, 500e6  # seconds to load a model of any size; bytes of the interpreter and libraries
ADAM = 16  # bytes a trained weight: itself, gradient, two moments, float32
LOGITS, CHUNK = 20, 4e6  # bytes a logit in training: five copies in float32; without a teacher of so many at a time


class Shape(NamedTuple):
    """A model as a stage meets it. ``bytes`` are those of all parameters as they are stored, ``itemsize`` those of one
    as a float. ``weights`` counts those of the blocks' linear layers, ``active`` those that a token is multiplied with,
    ``inputs`` the features that each layer reads and the share of the tokens that reach it. ``adapted`` counts the
    weights that have an adapter, ``adapted_active`` those of them that a token is multiplied with, ``factors`` the
    adapter's own at its largest rank."""

    parameters: int
    bytes: float
    itemsize: int
    weights: int
    active: float
    inputs: list[tuple[int, float]]
    layers: int
    hidden: int
    vocabulary: int
    packed: bool = False
    gguf: bool = False
    adapted: int = 0
    adapted_active: float = 0
    factors: int = 0


def shape_of(model: Any) -> Shape:
    """The sizes of a float model, live or a skeleton."""
    config, architecture, itemsize = model.config.get_text_config(), describe(model), model.dtype.itemsize
    parameters, shares = sum(p.numel() for p in model.parameters()), shares_of_tokens(model, architecture.names())
    sizes = {weight.name: weight.shape for weight in architecture.weights()}
    return Shape(parameters, parameters * itemsize, itemsize, sum(map(math.prod, sizes.values())),
                 sum(shares[name] * math.prod(size) for name, size in sizes.items()),
                 [(inputs, shares[name]) for name, (_, inputs) in sizes.items()], len(architecture.blocks),
                 config.hidden_size, config.vocab_size)  # fmt: skip


def adapted(shape: Shape, model: Any, architecture: Architecture, names: Collection[str], rank: int) -> Shape:
    """With an adapter of a rank on each of these weights."""
    shares = shares_of_tokens(model, names)
    sizes = {weight.name: weight.shape for weight in architecture.weights() if weight.name in shares}
    return shape._replace(
        adapted=sum(map(math.prod, sizes.values())), factors=rank * sum(map(sum, sizes.values())),
        adapted_active=sum(shares[name] * math.prod(size) for name, size in sizes.items()))  # fmt: skip


class Speed(NamedTuple):
    """FLOP/s of products as a model makes them in its dtype, and of the fastest library's in float32; bytes/s of
    copies (read and written)."""

    device: str
    products: float
    float32: float
    moved: float


def measure(dtype: torch.dtype) -> Speed:
    """The speed of the accelerator if there is one, else of the processor with the threads that torch uses."""
    device, threads = pick_device(), torch.get_num_threads()
    x = torch.randn(1024, 1024, device=device)
    low = x.to(dtype)
    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)  # more than caches hold
    target = torch.ones_like(source)

    def rate(call: Callable[[], object]) -> float:
        """Calls a second, by the median of a tenth of one. The timer waits until an accelerator has done its work."""
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        return 1 / timer.blocked_autorange(min_run_time=0.1).median

    return Speed(f"CPU, {threads} threads" if device.type == "cpu" else device.type.upper(),
                 2 * 1024**3 * rate(lambda: product(low, low)), 2 * 1024**3 * rate(lambda: product(x, x)),
                 2 * source.nbytes * rate(lambda: target.copy_(source)))  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model's own products and of others in float32, bytes moved, seconds that depend on none of these; the
    most bytes that are held."""

    products: float = 0.0
    float32: float = 0.0
    moved: float = 0.0
    fixed: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, speed: Speed) -> float:
        return self.products / speed.products + self.float32 / speed.float32 + self.moved / speed.moved + self.fixed


def forward(shape: Shape, tokens: float, length: float, head: bool = True) -> float:
    """FLOPs of a forward pass over sequences of ``length`` tokens each."""
    weights = shape.active + (shape.vocabulary * shape.hidden if head else 0)
    return 2 * tokens * (weights + 2 * length * shape.hidden * shape.layers)


def load(shape: Shape) -> Cost:
    """What every stage needs besides: a process, and a model that is read."""
    return Cost(fixed=START + GGUF * shape.parameters * shape.gguf, memory=PROCESS)


def _compress(shape: Shape, config: SparsifyConfig | QuantizeConfig, passes: int) -> Cost:
    """The calibration tokens, ``passes`` times. Held: their hidden states, a layer's inputs, a block, masks."""
    needed = config.repair != "none" or not (config.method in ("magnitude", "rtn") or getattr(config, "mask", None))
    tokens = needed * config.samples * config.length
    seen = tokens * ((1 + (config.repair != "none")) * shape.hidden + max(shape.inputs)[0]) * shape.itemsize
    return Cost(products=passes * forward(shape, tokens, config.length, head=False),
                memory=seen + (24 / shape.layers + 1 / 8) * shape.weights)  # fmt: skip


def sparsify(shape: Shape, config: SparsifyConfig) -> Cost:
    """Repair takes both models' activations along; training of blocks has a forward and two passes backward an epoch,
    and holds the inputs and outputs of a block besides."""
    cost = _compress(shape, config, passes=2) + Cost(moved=CHOOSE * shape.weights)
    if config.repair != "block":
        return cost
    tokens, block = config.samples * config.length, shape.weights / shape.layers
    return cost + Cost(products=3 * config.repair_epochs * forward(shape, tokens, config.length, head=False),
                       memory=2 * tokens * shape.hidden * shape.itemsize + ADAM * block)  # fmt: skip


def quantize(shape: Shape, config: QuantizeConfig) -> Cost:
    paired = config.repair == "layer" or is_paired(QUANTIZERS[config.method].needs)  # the dense model goes beside
    cost = _compress(shape, config, passes=1 if config.true_sequential and not paired else 2)
    cost += Cost(moved=CLIP * shape.weights * (config.clip != "none"))
    if config.method == "rtn":
        return cost
    products = 3 if paired else 1  # of the inputs: of a symmetric one half is computed
    tokens = products * config.samples * config.length
    hessians = sum(tokens * share * i**2 + FACTORIZE * i**3 for i, share in shape.inputs)
    return cost + Cost(float32=hessians, fixed=COLUMN * sum(inputs for inputs, _ in shape.inputs))


def batches(lengths: Lengths, config: TrainConfig) -> tuple[float, float, float]:
    """(steps, tokens with padding, tokens of the longest sequence) of a training."""
    totals = [min(prompt + completion, config.max_length) for prompt, completion in lengths]
    if config.packing:
        totals = [config.max_length] * max(1, sum(totals) // config.max_length)
    elif config.group_by_length:
        totals.sort()
    chunks = [totals[i : i + config.batch_size] for i in range(0, len(totals), config.batch_size)]
    steps = -(-len(chunks) // config.gradient_accumulation)
    epochs = config.max_steps / steps if config.max_steps > 0 else config.epochs
    return steps * epochs, sum(max(chunk) * len(chunk) for chunk in chunks) * epochs, max(totals)


def train(shape: Shape, config: TrainConfig) -> Cost:
    steps, tokens, longest = batches(of_training(config), config)
    passes = 3 if config.gradient_checkpointing else 2  # over the blocks; over the head two
    products = 2 * forward(shape, tokens, longest) + (passes - 2) * forward(shape, tokens, longest, head=False)
    built = UNPACK * shape.weights * shape.packed
    kind = KINDS[config.adapter]
    if kind.masked:  # the gradient of the whole weight; with dropout the adapter has its own products
        products += 2 * tokens * shape.adapted_active * (1 + passes * (config.lora_dropout > 0))
        built = 0 if kind.whole else BUILD[shape.packed] * shape.adapted
    times = 3 if config.distill_ranks else 1  # sub-adapters a step
    looks = bool(config.distill) / (config.epochs if config.distill_cache else 1)  # of a teacher of the model's size
    products = times * products + looks * forward(shape, tokens, longest)
    saved = shape.hidden if config.gradient_checkpointing else 10 * shape.hidden + 3 * max(shape.inputs)[0]
    a_step = config.batch_size * longest
    held = shape.itemsize * (shape.adapted * bool(config.base) + shape.parameters * bool(config.distill))
    held += (ADAM - shape.itemsize) * shape.adapted if kind.whole else 0
    held += LOGITS * (a_step * shape.vocabulary if config.distill or config.distill_ranks else CHUNK)
    held += shape.bytes + ADAM * shape.factors + a_step * shape.layers * saved * shape.itemsize
    return Cost(products=products, moved=steps * config.gradient_accumulation * passes * times * built, memory=held)


def _score(shape: Shape, lengths: Lengths, generated: int, batch_size: int, times: int = 1) -> Cost:
    """Problems are scored by float weights: by forwards, or by greedy generation of so many tokens each."""
    prompts, totals = [prompt for prompt, _ in lengths], [prompt + completion for prompt, completion in lengths]
    if not generated:
        longest = max(totals, default=0)
        logits = batch_size * longest * shape.vocabulary * (shape.itemsize + 4)
        return Cost(products=times * forward(shape, sum(totals), longest), memory=logits)
    passes = times * -(-len(prompts) // batch_size) * generated
    cache = batch_size * (max(prompts) + generated) * shape.layers * 2 * shape.hidden * shape.itemsize
    return Cost(products=times * forward(shape, sum(prompts) + len(prompts) * generated, max(prompts)), memory=cache,
                moved=passes * shape.parameters * shape.itemsize, fixed=passes * shape.layers * TOKEN)  # fmt: skip


def evaluate(shape: Shape, config: EvaluateConfig) -> Cost:
    cost = Cost(memory=shape.parameters * shape.itemsize)
    if config.task:
        cost += _score(shape, *of_problems(config, tuned=shape.adapted > 0), config.batch_size)
    if config.text:
        windows = of_text(config.text, config.max_tokens) // config.length
        cost += _score(shape, [(config.length, 0)] * windows, 0, max(1, config.batch_size // 8))
    return cost


def search(shape: Shape, config: SearchConfig) -> Cost:
    lengths, generated = of_problems(config, tuned=True)
    from sqft.searching.strategies import SEARCHES

    times = config.evaluations if config.strategy in SEARCHES else 1
    return _score(shape, lengths, generated * (config.metric == "accuracy"), config.batch_size, times) + Cost(
        moved=times * BUILD[shape.packed] * shape.weights,
        memory=shape.bytes + shape.parameters * shape.itemsize)  # fmt: skip


def merge(shape: Shape, config: Any) -> Cost:
    """Un-merged and merged model, both mapped, are compared on a few tokens (three forwards)."""
    built = BUILD[shape.packed] * shape.weights
    return Cost(products=forward(shape, 3 * 256, 64), moved=2 * built, memory=ADAM * shape.weights / shape.layers)
