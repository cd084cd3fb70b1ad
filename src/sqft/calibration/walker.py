"""The one loop over decoder blocks.

It holds the calibration activations and works on one block at a time: run the block to observe its linear inputs,
let the caller change its weights, run it again so that the next block sees the changed block's outputs (as Wanda and
SparseGPT do). The cost is two forward passes of the blocks; the memory one block and N x T x hidden activations.

Several processes share the batches, and statistics are of all of them (``statistics.Sum``); each then changes the
weights in the same way.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import greenlet
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from sqft.calibration.spill import Spilled
from sqft.config import even
from sqft.errors import SqftError, UsageError
from sqft.kernels.dispatch import release_memory
from sqft.kernels.halves import fast_halves, fast_products
from sqft.models.discover import Architecture, Block
from sqft.processes import count, mine

CACHE = ("past_key_values", "past_key_value", "layer_past")  # what blocks call theirs
NewStatistic = Callable[[str], Any]
Change = Callable[[Block, dict[str, Any]], None]


@dataclass
class Calls:
    """What flows between blocks: hidden states per batch, and how every block is called besides them."""

    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]  # per block and batch; what is equal is held once
    returns_tuple: bool


class Earlier(Protocol):
    """What an earlier walk has done before it was interrupted."""

    def known(self, block: Block) -> bool:
        """Whether it has done this block, and all that comes before."""
        ...

    def restore(self, block: Block) -> None:
        """Puts what it made into the block."""
        ...


class Rebuild(Protocol):
    """Changes a block as a whole, when all its layers have been changed one after the other."""

    def change(self, block: Block, forward: Callable[[Any, int], Tensor], targets: list[Tensor]) -> None:
        """``forward(tensors, i)`` is the block's output of batch i with these parameters, by name, in the place of its
        own; ``targets`` are what the un-changed block gives in the un-changed model."""
        ...


def walk(architecture: Architecture, tokens: Tensor | None, batch_size: int, new_statistic: NewStatistic,
         change: Change, progress: str, device: torch.device, sequential: bool = False, fast: bool = False,
         paired: bool = False, rebuild: Rebuild | None = None, earlier: Earlier | None = None,
         spill: str | None = None) -> Iterator[Block]:  # fmt: skip
    """Lets ``change(block, statistics)`` change one block after the other; yields each when the walk is done with it.

    It is a generator so that a caller can write and drop a block before the next one is touched, or let two walks with
    different inputs (of a pruned, and of a pruned and quantized model) take turns on each block.

    Args:
        tokens: int64 [N, T] calibration blocks, or None: then no forward is run and ``statistics`` is empty.
        new_statistic: makes an empty statistic of inputs, by a layer's name; layers of one input tensor share one.
        change: ``statistics`` maps weights' full names to their statistics. It may replace the block's weights.
        device: where a block that lies on the CPU is computed and changed, to go back afterwards. One on an accelerator
            stays there, and one that accelerate has hooks on goes where these put it. Activations stay where they are.
        sequential: call ``change`` for each group of layers that share an input, in the order in which they run, with
            the inputs that the already changed layers give ("true sequential"). Costs one pass instead of two, and
            the memory of what a block's forward holds in its middle, for all tokens.
        fast: multiply by the fastest library, instead of exactly as the model does.
        paired: with ``sequential``: carry the un-changed model's activations too, in as much memory and another pass;
            ``statistic.update(x, dense_x)`` gets both.
        rebuild: with ``paired``: what changes each block once more, as a whole; its inputs are held until then.
        earlier: blocks that need not be changed, only run.
        spill: a folder that holds what flows between blocks instead of memory (not what ``sequential`` holds).
    """
    with torch.no_grad():
        calls = None if tokens is None else capture(architecture, tokens, batch_size, spill)
        dense = capture(architecture, tokens, batch_size, spill) if tokens is not None and paired else None
    for index, block in enumerate(tqdm(architecture.blocks, desc=progress, unit="block", disable=None)):
        home, target = _places(block.module, device)
        if target != home:
            block.module.to(target)
        known = calls is not None and earlier is not None and earlier.known(block)
        anew = None if known or calls is None else rebuild
        inputs = copy.copy(calls.hidden) if calls is not None and anew is not None else []
        with torch.no_grad(), _multiplying(block, fast):
            if calls is None:
                change(block, {})
            elif known and earlier is not None:
                if dense is not None:
                    replay(block.module, index, dense, target, keep=True)
                earlier.restore(block)
                replay(block.module, index, calls, target, keep=True)
            elif sequential:
                _in_groups(block, index, calls, target, new_statistic, change, dense)
            else:
                with observing(block, new_statistic) as statistics:
                    replay(block.module, index, calls, target)
                change(block, statistics)
                if index + 1 < len(architecture.blocks):
                    replay(block.module, index, calls, target, keep=True)
        if anew is not None and calls is not None and dense is not None:
            calls.hidden = inputs
            anew.change(block, partial(_output, block.module, index, calls, target), dense.hidden)
            with torch.no_grad(), _multiplying(block, fast):
                replay(block.module, index, calls, target, keep=True)
        if target != home:
            block.module.to(home)
        yield block
        release_memory()


def _places(module: nn.Module, device: torch.device) -> tuple[torch.device | None, torch.device | None]:
    """Where a block lies and where it is to be computed; None: where accelerate's hooks put it."""
    if any(hasattr(child, "_hf_hook") for child in module.modules()):
        return None, None
    home = next(module.parameters()).device
    return home, device if home.type == "cpu" else home


def _multiplying(block: Block, fast: bool) -> AbstractContextManager[None]:
    """How the block's linear layers multiply: if ``fast`` by the fastest library: these passes are most of the work."""
    return fast_products(weight.module for weight in block.weights.values()) if fast else fast_halves(block.module)


def _in_groups(block: Block, index: int, calls: Calls, device: torch.device | None, new_statistic: NewStatistic,
               change: Change, dense: Calls | None = None) -> None:  # fmt: skip
    """Changes a block group after group in one pass over the batches.

    Each batch's forward is a greenlet, which stops when it comes to a group and hands over the group's input. When the
    inputs of all batches are seen the group is changed, and the forwards go on with what it gives now; those of the
    ``dense`` model's activations go on before, with what it gave.
    """
    experts = any(".experts." in name for name in block.weights)  # which of them run depends on the tokens
    with observing(block, lambda name: SimpleNamespace(update=lambda x: None)) as sharing:
        replay(block.module, index, calls, device, batches=range(len(calls.hidden) if experts else 1))
    groups: dict[int, list[str]] = {}
    for name in _in_order(list(sharing)):
        groups.setdefault(id(sharing[name]), []).append(name)
    scheduler = greenlet.getcurrent()

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        scheduler.switch((module, arguments[0]))

    leaders = [block.weights[names[0]].module for names in groups.values()]
    handles = [leader.register_forward_pre_hook(stop) for leader in leaders]
    forwards, beside = (
        [greenlet.greenlet(partial(replay, block.module, index, stream, device, True, range(i, i + 1)))
         for i in range(len(stream.hidden))] if stream else [] for stream in (calls, dense))  # fmt: skip
    changed: set[nn.Module] = set()

    def advance(forward: greenlet.greenlet) -> Any:
        """Lets a forward go on to a group that is not changed yet, and gives (module, input); None if it ends."""
        stop = forward.switch()
        while stop and stop[0] in changed:  # it calls that layer once more
            stop = forward.switch()
        return stop

    try:
        stops, dense_stops = ([advance(forward) for forward in stream] for stream in (forwards, beside))
        for leader, names in zip(leaders, groups.values(), strict=True):
            statistic = new_statistic(names[0])
            here = [i for i, stop in enumerate(stops) if stop and stop[0] is leader]
            changed.add(leader)
            for i in here:
                if dense and (dense_stops[i] or [None])[0] is not leader:
                    raise SqftError(f"{names[0]} is reached by other tokens in the un-changed model (an expert, say): "
                                    "leave --repair out, and take another method than gptaq")  # fmt: skip
                statistic.update(stops[i][1], *([dense_stops[i][1]] if dense else []))
                if dense:
                    dense_stops[i] = None  # the input's last reference
                    dense_stops[i] = advance(beside[i])
            change(block, dict.fromkeys(names, statistic))
            del statistic
            release_memory()
            for i in here:
                stops[i] = None
                stops[i] = advance(forwards[i])
    finally:
        for handle in handles:
            handle.remove()


def _in_order(names: list[str]) -> list[str]:
    """Layers in the order in which they run, given that in which they were first seen in some batches: experts run by
    their numbers, whichever a batch has, all of them between what comes before and after."""
    numbers = {name: int(name.partition(".experts.")[2].partition(".")[0]) for name in names if ".experts." in name}
    if not numbers:
        return names
    first = names.index(next(iter(numbers)))
    after = [name for name in names[first:] if name not in numbers]
    return names[:first] + sorted(numbers, key=numbers.__getitem__) + after


class _Stop(Exception):
    """Ends a forward where nothing further is wanted of it."""


def replay(module: nn.Module, index: int, calls: Calls, device: torch.device | None, keep: bool = False,
           batches: range | None = None) -> None:  # fmt: skip
    """Runs one block over all (or some) batches; with ``keep`` its outputs become the hidden states."""
    for i in range(len(calls.hidden)) if batches is None else batches:
        arguments, keywords = _to(calls.arguments[index][i], device)
        out = module(_to(calls.hidden[i], device), *arguments, **keywords)
        if keep:
            calls.hidden[i] = out[0] if calls.returns_tuple else out


def _output(module: nn.Module, index: int, calls: Calls, device: torch.device | None, tensors: Any, i: int) -> Tensor:
    """A block's output of batch i with these parameters in the place of its own, differentiable by them."""
    arguments, keywords = _to(calls.arguments[index][i], device)
    out = functional_call(module, tensors, (_to(calls.hidden[i], device), *arguments), keywords)
    return out[0] if calls.returns_tuple else out


def capture(architecture: Architecture, tokens: Tensor, batch_size: int, spill: str | None = None) -> Calls:
    """Embeds this process's batches and records how each block is called, without computing the blocks.

    Every block's forward is replaced for the time being by one that notes its arguments and passes the hidden states
    through; only the first block is run, once on one token, to see whether blocks return a tuple.
    """
    modules = [block.module for block in architecture.blocks]
    calls = Calls([] if spill is None else Spilled(spill), [[] for _ in modules], returns_tuple=False)
    replaced = [vars(module).get("forward") for module in modules]  # set on the instance by accelerate's hooks, say
    device = next(architecture.backbone.parameters()).device
    if device.type == "meta":  # off-loaded: accelerate's hooks move the tokens
        device = tokens.device

    def recorder(index: int) -> Callable[..., Any]:
        def record(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
            keywords = {k: v for k, v in keywords.items() if k not in CACHE} | {"use_cache": False}
            earlier = calls.arguments[index]
            earlier.append(_shared((arguments, keywords), earlier[0] if earlier else None))
            if index == 0:
                first.append(hidden)
            return (hidden, None) if calls.returns_tuple else hidden

        return record

    first: list[Tensor] = []
    # Batches of one size: then nearly all that blocks are called with is the same for all of them.
    size = even(len(tokens), batch_size)
    batches = tokens.split(size)
    if len(batches) < count():
        raise UsageError(f"{len(batches)} calibration batches of {size} cannot be divided among {count()} processes: "
                         "lower --batch-size, or take more --samples or fewer processes")  # fmt: skip
    with torch.no_grad():
        calls.returns_tuple = _returns_tuple(architecture, tokens[:1, :1].to(device))
        try:
            for i, module in enumerate(modules):
                module.forward = recorder(i)
            for batch in mine(batches):
                architecture.backbone(batch.to(device), use_cache=False)
                calls.hidden.append(first.pop())
        finally:
            for module, forward in zip(modules, replaced, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward
    return calls


def _returns_tuple(architecture: Architecture, token: Tensor) -> bool:
    """Whether blocks return (hidden, ...) or hidden: seen on a run of one token that stops after the first block."""
    seen: list[bool] = []

    def look(module: nn.Module, arguments: Any, out: Any) -> None:
        seen.append(isinstance(out, tuple))
        raise _Stop

    handle = architecture.blocks[0].module.register_forward_hook(look)
    try:
        with contextlib.suppress(_Stop):
            architecture.backbone(token, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@contextlib.contextmanager
def observing(block: Block, new_statistic: NewStatistic) -> Iterator[dict[str, Any]]:
    """Feeds the inputs of the block's linear layers to statistics while the block runs. Layers that are called with the
    very same tensor (q, k and v) share one statistic, which is updated once."""
    statistics: dict[str, Any] = {}
    leaders: dict[str, str] = {}
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if name not in leaders:
                leaders[name] = next((other for other, tensor in seen if tensor is x), name)
                statistics[name] = statistics[leaders[name]] if leaders[name] != name else new_statistic(name)
                seen.append((name, x))
            if leaders[name] == name:
                statistics[name].update(x)

        return observe

    def forget(module: nn.Module, arguments: Any, out: Any) -> None:
        seen.clear()

    handles = [weight.module.register_forward_pre_hook(hook(name)) for name, weight in block.weights.items()]
    handles.append(block.module.register_forward_hook(forget))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _to(value: Any, device: torch.device | None) -> Any:
    """Moves the tensors inside tuples, lists and dicts; None: leaves them where they are."""
    return value if device is None else _mapped(value, lambda tensor, _: tensor.to(device))


def _shared(value: Any, first: Any) -> Any:
    """``value``, its tensors replaced by those at their place in ``first`` that are equal to them."""

    def choose(tensor: Tensor, other: Any) -> Tensor:
        alike = isinstance(other, Tensor) and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        return other if alike and torch.equal(tensor, other) else tensor

    return _mapped(value, choose, first)


def _mapped(value: Any, change: Callable[[Tensor, Any], Tensor], other: Any = None) -> Any:
    """``change(tensor, what other has at its place)`` for the tensors inside tuples, lists and dicts. A container in
    which nothing changes stays the same object: blocks may share one and write to it."""
    if isinstance(value, Tensor):
        return change(value, other)
    if not isinstance(value, (dict, tuple, list)):
        return value
    old, others = (v if isinstance(v, dict) else dict(enumerate(v)) if isinstance(v, (tuple, list)) else {}
                   for v in (value, other))  # fmt: skip
    new = {k: _mapped(v, change, others.get(k)) for k, v in old.items()}
    if all(new[k] is v for k, v in old.items()):
        return value
    return new if isinstance(value, dict) else type(value)(new.values())
