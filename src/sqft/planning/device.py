"""What the device that a stage would run on does in a second: products and copies, measured for a third of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sqft.kernels.dispatch import product

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
    """Measures the GPU if there is one, else the processor with the threads that torch uses."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    x, w = (torch.randn(SIZE, SIZE, device=device) for _ in range(2))
    low_x, low_w = x.to(dtype), w.to(dtype)
    flops = 2.0 * SIZE**3
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        return Speed(
            name, flops * _rate(lambda: F.linear(low_x, low_w)), flops * _rate(lambda: product(low_x, low_w)),
            flops * _rate(lambda: product(x, w)), 2.0 * COPIED * _rate(lambda: target.copy_(source)),
        )  # fmt: skip


def _rate(call: Callable[[], object]) -> float:
    """Calls a second."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    synchronize()
    calls, started = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        if time.perf_counter() - started >= SECONDS or calls % 64 == 0:
            synchronize()  # what was queued only, counts
            if (passed := time.perf_counter() - started) >= SECONDS:
                return calls / passed
