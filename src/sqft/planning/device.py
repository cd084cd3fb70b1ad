"""What the device that a stage would run on does in a second: products and copies, measured for a third of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sqft.kernels.dispatch import pick_device, product

SIZE = 1024  # of the products
COPIED = 1 << 26  # bytes of a copy: more than caches hold
SECONDS = 0.1  # a measurement


@dataclass(frozen=True)
class Speed:
    """FLOP/s of a model's own products, of the fastest library's in the same dtype and in float32; bytes/s of copies
    (read and written)."""

    device: str
    products: float
    fast: float
    fast32: float
    moved: float


def measure_device(dtype: torch.dtype = torch.float32) -> Speed:
    """Measures the accelerator if there is one, else the processor with the threads that torch uses."""
    device = pick_device()
    name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()
    x, w = (torch.randn(SIZE, SIZE, device=device) for _ in range(2))
    low_x, low_w = x.to(dtype), w.to(dtype)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls = (lambda: F.linear(low_x, low_w), lambda: product(low_x, low_w), lambda: product(x, w))
    with torch.no_grad():
        products, fast, fast32 = (2.0 * SIZE**3 * _rate(call, device) for call in calls)
        return Speed(name, products, fast, fast32, 2.0 * COPIED * _rate(lambda: target.copy_(source), device))


def _rate(call: Callable[[], object], device: torch.device) -> float:
    """Calls a second, after one that warms up. What an accelerator has only queued does not count."""
    synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    call()
    synchronize()
    calls, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < SECONDS:
        call()
        calls += 1
        if calls % 64 == 0 or time.perf_counter() - started >= SECONDS:
            synchronize()
    return calls / passed
