"""What this machine does in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from sqft.kernels.dispatch import pick_device, product


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
