"""Estimates of a stage's time and memory from a model's sizes, before anything is loaded.

Time is work over speed: FLOPs of products and bytes moved, over what ``measure`` finds. ``docs/recipes.md`` compares it
with runs of SmolLM2-135M, on which the constants were measured; what took less than a tenth of every stage is left out.
A stage's function has its name and takes (the model, its options).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from sqft.calibration.statistics import is_paired
from sqft.config import EvaluateConfig, QuantizeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.measuring.speed import Speed
from sqft.models.discover import Architecture, describe
from sqft.models.experts import shares_of_tokens
from sqft.planning.workload import Count, Lengths, Problems, counted, of_problems, of_text, of_training
from sqft.registry import KINDS, QUANTIZERS

# Bytes moved a weight, where a step is bound by memory.
CHOOSE, CLIP = 1600, 2200  # Wanda's choice; the search for ranges
BUILD = {False: 80, True: 190}  # a masked adapter's effective weight, on a float and on a packed base
UNPACK = 45
FACTORIZE = 8  # x I^3 FLOPs: two Cholesky factors and an inverse in float64, in float32's FLOPs
COLUMN = 5e-5  # seconds a column of GPTQ's loop, whatever its length
TOKEN = 1e-3  # seconds a layer and generated token, whatever its size: Python and launches
GGUF = 1.1e-7  # seconds a weight to de-quantize a GGUF file
START, PROCESS, TRAINER = 2.0, 380e6, 50e6  # seconds to load a model; bytes of libraries, and to train
ADAM = 16  # bytes a trained weight: itself, gradient, two moments, float32
LOGITS, CHUNK = 24, 4e6  # bytes a logit in training: six copies in float32; without a teacher of so many at a time
# Bytes a weight while it is pruned, quantized or repaired; I^2 bytes of GPTQ (bench_memory.py --only gptq) and repair.
COPIES, ROUNDED, REPAIRED = 40, 13.2, 17


class Shape(NamedTuple):
    """A model as a stage meets it."""

    parameters: int
    bytes: float  # of all parameters as they are stored
    itemsize: int  # bytes of one as a float
    weights: int  # of the blocks' linear layers
    largest: int  # of one of these
    active: float  # of them that a token is multiplied with
    inputs: list[tuple[int, float]]  # features that each layer reads, and the share of the tokens that get there
    layers: int
    hidden: int
    vocabulary: int
    cached: int  # a token's keys and values
    packed: bool = False
    gguf: bool = False
    adapted: int = 0  # weights that have or had an adapter
    adapted_active: float = 0  # of them that a token is multiplied with
    factors: int = 0  # the adapter's own at its largest rank
    counter: Count = counted  # tokens of texts

    @property
    def widened(self) -> float:
        """Bytes of embeddings and head that are stored in half precision, and computed in float32."""
        return (self.parameters - self.weights) * self.itemsize * (self.packed and self.itemsize == 4)


def shape_of(model: Any) -> Shape:
    """The sizes of a float model, live or a skeleton."""
    config, architecture, itemsize = model.config.get_text_config(), describe(model), model.dtype.itemsize
    parameters, shares = sum(p.numel() for p in model.parameters()), shares_of_tokens(model, architecture.names())
    sizes = {weight.name: weight.shape for weight in architecture.weights()}
    cached = sum(outputs for name, (outputs, _) in sizes.items() if name.endswith(("k_proj", "v_proj")))
    numbers = {name: math.prod(size) for name, size in sizes.items()}
    return Shape(parameters, parameters * itemsize, itemsize, sum(numbers.values()), max(numbers.values()),
                 sum(shares[name] * number for name, number in numbers.items()),
                 [(inputs, shares[name]) for name, (_, inputs) in sizes.items()], len(architecture.blocks),
                 config.hidden_size, config.vocab_size,
                 cached or 2 * config.hidden_size * len(architecture.blocks))  # fmt: skip


def adapted(shape: Shape, model: Any, architecture: Architecture, names: Collection[str], rank: int) -> Shape:
    """With an adapter of a rank on each of these weights."""
    shares = shares_of_tokens(model, names)
    sizes = {weight.name: weight.shape for weight in architecture.weights() if weight.name in shares}
    return shape._replace(
        adapted=sum(map(math.prod, sizes.values())), factors=rank * sum(map(sum, sizes.values())),
        adapted_active=sum(shares[name] * math.prod(size) for name, size in sizes.items()))  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a stage takes."""

    products: float = 0.0  # FLOPs of a model's own products
    float32: float = 0.0  # and of others
    moved: float = 0.0  # bytes
    fixed: float = 0.0  # seconds that depend on none of these
    memory: float = 0.0  # the most bytes that are held

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
    """The calibration tokens, ``passes`` times. Held: their hidden states (of a walk from layer to layer a layer's
    inputs too, of both models if it repairs), a changed block, masks, and what the largest weight takes."""
    needed = config.repair != "none" or not (config.method in ("magnitude", "rtn") or getattr(config, "mask", None))
    tokens, repairs, widest = needed * config.samples * config.length, config.repair != "none", max(shape.inputs)[0]
    walks = isinstance(config, QuantizeConfig) or repairs
    seen = tokens * (1 + repairs) * (shape.hidden + walks * (shape.hidden + widest)) * shape.itemsize
    squares = REPAIRED if repairs else ROUNDED * isinstance(config, QuantizeConfig)
    return Cost(products=passes * forward(shape, tokens, config.length, head=False),
                memory=seen + shape.itemsize * shape.weights / shape.layers + shape.weights / 8 + squares * widest**2
                + COPIES * shape.largest)  # fmt: skip


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


def train(shape: Shape, config: TrainConfig, sizes: tuple[float, float, float] | None = None) -> Cost:
    """Of the config's data, or of ``sizes`` as ``batches`` gives them."""
    steps, tokens, longest = sizes or batches(of_training(config, shape.counter), config)
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
    held = LOGITS * (a_step * shape.vocabulary if config.distill or config.distill_ranks else CHUNK)
    held += a_step * shape.layers * saved * shape.itemsize
    if kind.whole:  # gradients come as activations go; the optimizer's step makes something of all at once
        held = max(held + (ADAM - 4) * shape.adapted, (ADAM + 4) * shape.adapted)
    held += shape.itemsize * (shape.adapted * bool(config.base) + shape.parameters * bool(config.distill)) + TRAINER
    held += shape.bytes + shape.widened + ADAM * shape.factors + COPIES / 2 * shape.largest + shape.weights / 8
    return Cost(products=products, moved=steps * config.gradient_accumulation * passes * times * built, memory=held)


def _score(shape: Shape, problems: Problems, batch_size: int, times: int = 1) -> Cost:
    """Problems are scored by float weights: by forwards, with logits as they are, in float32 and their logarithms at
    once, or by greedy generation of so many tokens each."""
    prompts, generated = [prompt for prompt, _ in problems.lengths], problems.generated
    cache = batch_size * (max(prompts) + generated) * shape.cached * shape.itemsize
    if not generated:
        totals = list(map(sum, problems.lengths))
        logits = batch_size * problems.longest * shape.vocabulary * (shape.itemsize + 4 + 4 * (shape.itemsize < 4))
        return Cost(products=times * forward(shape, sum(totals), max(totals)), memory=cache + logits)
    passes = times * -(-len(prompts) // batch_size) * generated
    return Cost(products=times * forward(shape, sum(prompts) + len(prompts) * generated, max(prompts)), memory=cache,
                moved=passes * shape.parameters * shape.itemsize, fixed=passes * shape.layers * TOKEN)  # fmt: skip


def _served(shape: Shape) -> float:
    """Bytes of a model that is scored: its files, and weights that are unpacked or merged for a while."""
    changed = shape.weights if shape.packed else shape.adapted * bool(shape.factors)
    return shape.bytes + shape.widened + changed * shape.itemsize


def evaluate(shape: Shape, config: EvaluateConfig) -> Cost:
    problems = of_problems(config, shape.adapted > 0, shape.counter) if config.task else None
    cost = _score(shape, problems, config.batch_size) if problems else Cost()
    if config.text:
        tokens, windows = of_text(config.text, config.max_tokens, shape.counter), max(1, config.batch_size // 8)
        cost = replace(cost, products=cost.products + forward(shape, tokens, config.length), memory=max(
            cost.memory, (windows * shape.itemsize + 8) * config.length * shape.vocabulary))  # fmt: skip
    return cost + Cost(memory=_served(shape))


def search(shape: Shape, config: SearchConfig) -> Cost:
    problems = of_problems(config, True, shape.counter)
    from sqft.searching.strategies import SEARCHES

    problems = problems._replace(generated=problems.generated * (config.metric == "accuracy"))
    times = config.evaluations if config.strategy in SEARCHES else 1
    return _score(shape, problems, config.batch_size, times) + Cost(
        moved=times * BUILD[shape.packed] * shape.weights, memory=_served(shape) + TRAINER)  # fmt: skip


def merge(shape: Shape, config: Any) -> Cost:
    """Un-merged and merged model, both mapped, are compared on a few tokens (three forwards)."""
    built = BUILD[shape.packed] * shape.weights
    return Cost(products=forward(shape, 3 * 256, 64), moved=2 * built, memory=shape.widened + shape.weights / 4
                + 3 * 256 * shape.vocabulary * shape.itemsize + COPIES / 2 * shape.largest)  # fmt: skip
