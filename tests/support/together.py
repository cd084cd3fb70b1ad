"""What test_distributed.py and bench_scale.py start by torchrun: jobs, each done by all processes together.

    torchrun --nproc-per-node N tests/support/together.py JOBS.json

A job holds the arguments of ``train``, or of ``compress``, or {"fail": arguments}: the command line, whose process 1 fails in
the second step; or {"divide": number}: of jobs that tell who does them.
Each process writes what it was told to OUT.RANK.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sqft
from sqft.cli import main
from sqft.config import TrainConfig
from sqft.errors import SqftError
from sqft.processes import divided, is_main_process, join
from sqft.training.callbacks import Guard

EXAMPLES = [sqft.Example(f"Q: {'so ' * (i % 5)}{i} plus {i}?\nA:", f" {2 * i}{' indeed' * (i % 3)}") for i in range(21)]
OPTIONS: dict[str, Any] = {"batch_size": 8, "max_steps": 5, "r": 4, "lora_alpha": 8, "learning_rate": 0.02, "logging_steps": 1,
                           "save_steps": 2}  # fmt: skip


class Stopped(Exception):
    """An interruption, of all processes at once."""


@contextlib.contextmanager
def raising(error: Exception, when: Callable[[int], bool]) -> Iterator[None]:
    """Raises the error at the end of the steps that ``when`` is true of, but after what is saved."""
    usual = Guard.on_step_begin

    def begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if when(state.global_step):
            raise error
        usual(self, args, state, control, **kwargs)

    Guard.on_step_begin = begin  # pyright: ignore
    try:
        yield
    finally:
        Guard.on_step_begin = usual


def train(source: str, out: str, config: dict[str, Any], stop: int = -1) -> dict[str, Any]:
    """21 examples in batches of 8: an epoch ends with a batch that is not whole. ``stop``: interrupted after that step."""
    with contextlib.suppress(Stopped), raising(Stopped(), lambda step: step == stop):
        return sqft.train(source, TrainConfig(**{**OPTIONS, **config}), EXAMPLES, eval_data=EXAMPLES[:9], out=out)
    return {}


def compress(
    stage: str, source: str, out: str, config: dict[str, Any], first: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``sqft.sparsify`` or ``sqft.quantize`` of 8 blocks of 24 tokens, in batches of 2."""
    kind = sqft.SparsifyConfig if stage == "sparsify" else sqft.QuantizeConfig
    join()
    options = {"samples": 8, "length": 24, "batch_size": 2}
    given = {"first": sqft.SparsifyConfig(**{**options, **first})} if first else {}
    return getattr(sqft, stage)(source, kind(**{**options, **config}), out=out, **given)


def divide(number: int, out: str) -> dict[str, Any]:
    join()
    rank = torch.distributed.get_rank()
    jobs = [lambda i=i: {"job": torch.full((i,), float(i)), "process": torch.tensor(rank)} for i in range(number)]
    return {"found": [{name: tensor.tolist() for name, tensor in each.items()} for each in divided(jobs)]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "fail" in job:
            with raising(
                SqftError("the disk of this machine is full"), lambda step: step == 2 and not is_main_process()
            ):
                sys.exit(main(job["fail"]))
        metrics = (
            divide(job["divide"], job["out"])
            if "divide" in job
            else compress(**job)
            if "stage" in job
            else train(**job)
        )
        Path(f"{job['out']}.{torch.distributed.get_rank()}.json").write_text(json.dumps(metrics))
