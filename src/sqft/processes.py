"""Several processes, as torchrun starts them: which one this is, who writes, who waits, and how all of them end.

They wait for each other in torch.distributed's store, not in a collective, which gives up after minutes: one process
may write, or run a stage of hours, while the others wait. A process that did not import torch is alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_FAILED = "failed"
_PAUSE = 0.1  # seconds between two looks into the store
_alone: ContextVar[bool] = ContextVar("alone", default=False)  # in the work of ``alone`` there are no others


class Elsewhere(Exception):
    """Another process has failed, and said why; ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("another process has failed")
        self.code = code


def _group() -> Any:
    """``torch.distributed`` if this process is one of a group, and they work together."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    there = distributed and distributed.is_available() and distributed.is_initialized() and not _alone.get()
    return distributed if there else None


def count() -> int:
    """How many processes work together."""
    group = _group()
    return group.get_world_size() if group else 1


def mine(parts: Sequence[Any]) -> list[Any]:
    """Of some parts of a work those that this process does."""
    group = _group()
    return list(parts)[group.get_rank() :: group.get_world_size()] if group else list(parts)


def total(tensor: T) -> T:
    """The sum of all processes' tensors, in the place of this one's. All have to ask for the same things in the same
    order, and none waits for another for longer than torch.distributed's timeout."""
    if (group := _group()) is not None:
        group.all_reduce(tensor)
    return tensor


def divided(jobs: Sequence[Callable[[], dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The tensors that each job gives, in the jobs' order. Of several processes each does a share of them, one at a
    time, and sends what it gives to all others; there they are on the CPU."""
    if (group := _group()) is None:
        yield from (job() for job in jobs)
        return
    import torch
    from safetensors.torch import load, save

    device = torch.device("cpu") if group.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    for start in range(0, len(jobs), count()):
        owned = dict(enumerate(jobs[start : start + count()]))
        mine = owned[group.get_rank()]() if group.get_rank() in owned else {}
        data = bytearray(save({name: tensor.cpu().contiguous() for name, tensor in mine.items()}))
        for owner in owned:
            size = torch.tensor(len(data), device=device)
            group.broadcast(size, owner)
            here = group.get_rank() == owner
            sent = torch.frombuffer(data, dtype=torch.uint8) if here else torch.empty(int(size), dtype=torch.uint8)
            group.broadcast(sent := sent.to(device), owner)
            yield mine if here else load(sent.cpu().numpy().tobytes())


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first."""
    group = _group()
    return not (group and group.get_rank())


def join() -> bool:
    """Makes this process one of those that torchrun started, with its own accelerator; CPUs talk by gloo. Whether there
    are several."""
    import torch

    distributed = torch.distributed
    place = distributed.get_node_local_rank(-1) if distributed.is_available() else -1  # set by torchrun, and its like
    if place < 0 or distributed.is_initialized():
        return count() > 1
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(place)
    distributed.init_process_group()
    return count() > 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The life of a command: ``join``. Only the main process says something; when another one has failed, torchrun's
    SIGTERM ends each as an error does, with its temporary folders removed."""
    if not join():
        yield
        return

    def end(*_: Any) -> NoReturn:
        raise Elsewhere(1)

    signal.signal(signal.SIGTERM, end)
    with contextlib.ExitStack() as silence:
        if not is_main_process():
            nobody = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nobody))
            silence.enter_context(contextlib.redirect_stderr(nobody))
        yield
    _group().destroy_process_group()


def _store() -> Any:
    from torch.distributed import PrefixStore, distributed_c10d

    return PrefixStore("sqft", distributed_c10d._get_default_store())


def is_first_to_fail(code: int) -> bool:
    """Says to the others that this process ends with ``code``. Only the first one that does has something to tell: the
    others end because of it."""
    if not join():
        return True
    mine = f"{code} {_group().get_rank()}"
    try:
        return _store().compare_set(_FAILED, "", mine).decode() == mine
    except RuntimeError:  # the store went with the process that held it
        return False


def alone(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, which only the main process does, and the others wait for: something that JSON can hold.
    Raises Elsewhere where it failed."""
    if count() == 1:
        return work()
    store = _store()
    # Every process waits for the same things in the same order: its own count names them.
    name = f"done-{store.add(f'waits-{_group().get_rank()}', 1)}"
    if is_main_process():
        token = _alone.set(True)
        try:
            value = work()
        finally:
            _alone.reset(token)
        store.set(name, json.dumps(value))
        return value
    try:
        while not store.check([name]):
            if store.check([_FAILED]):
                raise Elsewhere(int(store.get(_FAILED).split()[0]))
            time.sleep(_PAUSE)
        return json.loads(store.get(name))
    except RuntimeError:  # the store went with the process that held it
        raise Elsewhere(1) from None
