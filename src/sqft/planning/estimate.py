"""Estimates of a stage's time, memory and disk from a model's sizes, before anything is loaded.

Time is work over speed: FLOPs of products and bytes moved, over what ``device.measure_device`` measured.
``docs/recipes.md`` has the formulas and compares them with runs of SmolLM2-135M, on which the constants in front of
memory passes were measured. A stage's function has its name and takes (the model, its options, the text that it reads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from sqft.config import EvaluateConfig, QuantizeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.planning.device import Speed
from sqft.planning.shape import Linear, Shape
from sqft.planning.workload import Lengths, Workload
from sqft.registry import KINDS

# Bytes moved a weight, where a step is bound by memory.
CHOOSE, CLIP, ROUND = 1600, 2200, 1000  # Wanda's choice; GPTQ's search for ranges; its loop over columns
BUILD, BUILD_PACKED = 80, 190  # a masked adapter's effective weight, on a float and on a packed base
UNPACK = 45
FACTORIZE = 8  # x I^3 FLOPs: two Cholesky factors and an inverse in float64, in float32's FLOPs
COLUMN = 5e-5  # seconds a column of GPTQ's loop, whatever its length
TOKEN = 1e-3  # seconds a layer and generated token, whatever its size: Python and launches
GGUF = 1.1e-7  # seconds a weight to de-quantize a GGUF file
START = 3.0  # seconds to start a stage: libraries, tokenizer
SHORT = 1.35  # times as long as their FLOPs: the products of short sequences, beside the large ones that are measured
ADAM = 16  # bytes a trained weight: itself, gradient, two moments, float32
LOGITS = 5  # float32 copies of the logits while training
REUSES = (".k_proj", ".v_proj", ".up_proj")  # they read the same input as the linear layer before them


@dataclass(frozen=True)
class Work:
    """FLOPs of a model's own products, of the fastest library's (in its dtype and in float32), bytes moved, and seconds
    that depend on neither."""

    products: float = 0.0
    fast: float = 0.0
    fast32: float = 0.0
    moved: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, n: float) -> Work:
        return Work(*(value * n for value in astuple(self)))

    @property
    def flops(self) -> float:
        return self.products + self.fast + self.fast32

    def seconds(self, speed: Speed) -> float:
        return (self.products / speed.products + self.fast / speed.fast + self.fast32 / speed.fast32
                + self.moved / speed.moved + self.fixed)  # fmt: skip


class Estimate(NamedTuple):
    """Work of a stage; the most bytes that it holds on the device that computes."""

    work: Work
    memory: float


class Run(NamedTuple):
    """A model as a stage meets it: its weights' bytes in memory, whether they are packed, or in a GGUF file; the linear
    layers that get an adapter; whether blocks are computed on a GPU, one by one."""

    shape: Shape
    bytes: float
    packed: bool = False
    gguf: bool = False
    adapted: Sequence[Linear] = ()
    on_gpu: bool = False

    def load(self) -> Work:
        return Work(moved=4 * self.bytes, fixed=START + GGUF * self.shape.parameters * self.gguf)

    def whole(self, tokens: float) -> float:
        """Bytes of the model and the hidden states, where these do not stay off the device that computes."""
        return 0 if self.on_gpu else self.bytes + tokens * self.shape.hidden * self.shape.itemsize


def forward(shape: Shape, tokens: float, length: float, head: bool = True) -> Work:
    """A forward pass over sequences of ``length`` tokens each."""
    products = 2 * tokens * (shape.weights + shape.head * head) + 4 * tokens * length * shape.hidden * shape.layers
    elementwise = shape.layers * (20 * shape.hidden + 4 * shape.inner) * shape.itemsize
    return Work(products=products, moved=tokens * elementwise)


def sparsify(run: Run, config: SparsifyConfig, data: Workload) -> Estimate:
    shape = run.shape
    tokens = 0 if config.method == "magnitude" else config.samples * config.length
    work = run.load() + forward(shape, tokens, config.length, head=False).times(2)
    work += Work(moved=(CHOOSE + 3 * shape.itemsize) * shape.weights)
    batch = config.batch_size * config.length * (4 * shape.hidden + 3 * shape.inner) * shape.itemsize
    return Estimate(work, run.whole(tokens) + shape.weights / shape.layers * (shape.itemsize + 20) + batch)


def quantize(run: Run, config: QuantizeConfig, data: Workload) -> Estimate:
    shape, calibrated = run.shape, config.method != "rtn"
    tokens = config.samples * config.length if calibrated else 0
    once = forward(shape, tokens, config.length, head=False)
    work = run.load() + Work(fast=once.products, moved=once.moved).times(1 if config.true_sequential else 2)
    inputs = [linear.inputs for linear in shape.linears if not linear.name.endswith(REUSES)]
    if calibrated:
        work += Work(fast32=sum(tokens * i**2 + FACTORIZE * i**3 for i in inputs)
                     + sum(linear.weights * linear.inputs for linear in shape.linears),
                     moved=ROUND * shape.weights, fixed=COLUMN * sum(inputs))  # fmt: skip
    work += Work(moved=(CLIP * (config.clip == "mse") + 60) * shape.weights)
    held = tokens * (shape.inner if config.true_sequential else shape.hidden) * shape.itemsize
    hessian = max(inputs) ** 2 * (4 + 3 * 8) if calibrated else 0
    block = shape.weights / shape.layers * (shape.itemsize + 8)
    return Estimate(work, run.whole(tokens) + block + held + hessian)


def batches(lengths: Lengths, config: TrainConfig) -> tuple[float, float, float]:
    """(steps, tokens with padding, tokens of the longest sequence) of a training."""
    totals = [min(prompt + completion, config.max_length) for prompt, completion in lengths]
    if config.packing:
        totals = [config.max_length] * max(1, sum(totals) // config.max_length)
    elif config.group_by_length:
        totals.sort()
    chunks = [totals[i : i + config.batch_size] for i in range(0, len(totals), config.batch_size)]
    padded = sum(max(chunk) * len(chunk) for chunk in chunks)
    steps = -(-len(chunks) // config.gradient_accumulation) * config.epochs
    if config.max_steps > 0:
        return config.max_steps, padded * config.epochs * config.max_steps / max(1, steps), max(totals)
    return steps, padded * config.epochs, max(totals)


def train(run: Run, config: TrainConfig, data: Workload) -> Estimate:
    shape = run.shape
    steps, tokens, longest = batches(data.lengths, config)
    micro = steps * config.gradient_accumulation
    mean = tokens / max(1.0, micro * config.batch_size)
    passes = 3 if config.gradient_checkpointing else 2  # of the blocks; of the head two
    weights = sum(linear.weights for linear in run.adapted)
    factors = max([config.r, *config.search_space] if config.search_space else [config.r])
    edges = factors * sum(linear.inputs + linear.outputs for linear in run.adapted)
    masked = KINDS[config.adapter].masked
    work = forward(shape, tokens, mean, head=False).times(passes) + Work(products=4 * tokens * shape.head)
    work += Work(moved=tokens * shape.vocabulary * 4 * 2 * LOGITS)
    if masked:  # these layers multiply by the fastest library, forward, back and for the gradient
        apart = 2 if config.lora_dropout else 1
        work += Work(products=-2 * tokens * weights * passes,
                     fast=2 * tokens * weights * (passes * apart + 1) + micro * 2 * factors * weights * (passes + 2),
                     moved=micro * weights * passes * (BUILD_PACKED if run.packed else BUILD))  # fmt: skip
    else:
        work += Work(products=2 * tokens * edges * (passes + 1))
    if run.packed:
        work += Work(moved=micro * passes * UNPACK * (shape.weights - weights * masked))
    work += Work(moved=steps * ADAM * 2 * edges)
    seen = [min(prompt + completion, config.max_length) for prompt, completion in data.evaluation]
    work += forward(shape, sum(seen) * max(1.0, config.epochs), mean)
    saved = shape.hidden if config.gradient_checkpointing else 10 * shape.hidden + 3 * shape.inner
    batch = config.batch_size * longest
    memory = (run.bytes + (weights * shape.itemsize if config.base else 0) + weights / 8 + ADAM * edges
              + batch * (shape.layers * saved + 10 * shape.hidden + 3 * shape.inner) * shape.itemsize
              + batch * shape.vocabulary * 4 * LOGITS)  # fmt: skip
    return Estimate(run.load() + work.times(SHORT), memory)


def generate(run: Run, lengths: Lengths, batch_size: int, new_tokens: float) -> Estimate:
    """Greedy generation of ``new_tokens`` for each of the prompts, with the weights held as floats."""
    shape = run.shape
    prompts = [prompt for prompt, _ in lengths]
    passes = -(-len(prompts) // batch_size) * new_tokens
    work = forward(shape, sum(prompts), sum(prompts) / max(1, len(prompts)))
    work += Work(products=2 * (shape.weights + shape.head) * len(prompts) * new_tokens,
                 moved=passes * shape.parameters * shape.itemsize, fixed=passes * shape.layers * TOKEN)  # fmt: skip
    cache = batch_size * (max(prompts, default=0) + new_tokens) * shape.layers * 2 * shape.hidden * shape.itemsize
    return Estimate(work, shape.parameters * shape.itemsize + cache + batch_size * shape.vocabulary * 4)


def evaluate(run: Run, config: EvaluateConfig, data: Workload) -> Estimate:
    shape, lengths = run.shape, data.lengths
    work, memory = run.load() + Work(moved=UNPACK * shape.weights * run.packed), run.bytes
    if data.generated:
        scored = generate(run, lengths, config.batch_size, data.generated)
        work, memory = work + scored.work, max(memory, scored.memory)
    elif lengths:
        work += forward(shape, sum(map(sum, lengths)), sum(map(sum, lengths)) / len(lengths))
    if data.text:
        work += forward(shape, data.text, config.length)
        logits = max(1, config.batch_size // 8) * config.length * shape.vocabulary * (shape.itemsize + 4)
        memory = max(memory, shape.parameters * shape.itemsize + logits)
    return Estimate(work, memory)


def search(run: Run, config: SearchConfig, data: Workload) -> Estimate:
    shape, lengths = run.shape, [prompt + completion for prompt, completion in data.lengths]
    if config.metric == "accuracy" and data.generated:
        one = generate(run, data.lengths, config.batch_size, data.generated)
    else:
        logits = config.batch_size * max(lengths, default=0) * shape.vocabulary * (shape.itemsize + 4)
        once = forward(shape, sum(lengths), sum(lengths) / max(1, len(lengths)))
        one = Estimate(once, shape.parameters * shape.itemsize + logits)
    each = one.work + Work(moved=(BUILD_PACKED + UNPACK if run.packed else BUILD) * shape.weights)
    count = config.evaluations if config.strategy in ("random", "hill-climb", "nsga2") else 1
    return Estimate(run.load() + each.times(count * SHORT), run.bytes + one.memory)


def merge(run: Run, config: Any, data: Workload) -> Estimate:
    """Both are loaded, compared on a few tokens (three forwards), written, and read again to be checked."""
    passes = 2 * (BUILD_PACKED + 2 * UNPACK) if run.packed else 2 * BUILD
    work = run.load().times(2) + Work(moved=passes * run.shape.weights + 6 * run.bytes)
    return Estimate(work + forward(run.shape, 3 * 256, 64), 2 * run.bytes)
