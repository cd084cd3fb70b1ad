"""Where things are computed and by what: the device, an operator's implementation for it, sizes of chunks, memory. The
only reader of the environment.

An operator is a row of ``registry.KERNELS``: its name, with the reference in plain torch. A row ``name.device`` (as in
``masked_weight.cuda``) is an implementation for a type of device: it has the same arguments and results, no autograd
and no autocast. Packages add rows by entry points in the group ``sqft.kernels``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.errors import UsageError
from sqft.registry import KERNELS

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Weight elements a chunk: on a CPU 2 MiB of float32, which stay in the cache; elsewhere few launches matter more.
CHUNK_ELEMENTS = {"cpu": 1 << 19}
LARGE_CHUNK = 1 << 26


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: ``auto`` (the accelerator if there is one, else the CPU), ``cpu``, ``meta``, or an
    accelerator of torch's, with or without an index (``cuda``, ``cuda:1``, ``xpu``, ``mps``).

    Raises UsageError for a device that this machine does not have; the message names those it has.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    kinds = ["cpu", "meta"]
    if accelerator is not None:
        kinds += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in kinds:
        raise UsageError(f"there is no device '{name}' here: choose from auto, {', '.join(kinds)}")
    return torch.device(name)


@functools.cache
def kernel(op: str, device_type: str) -> Callable[..., Any]:
    """The implementation of an operator for a type of device: its own if there is one, else the reference.
    Raises SqftError for a package's implementation that does not load."""
    name = f"{op}.{device_type}"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:  # torch brings it, but not to every system
        return KERNELS[op]
    return KERNELS[name if name in KERNELS else op]


def has_kernel(op: str, device_type: str) -> bool:
    """Whether an operator has an implementation for a type of device."""
    return kernel(op, device_type) is not KERNELS[op]


@functools.cache
def use_onednn() -> bool:
    """Whether float32 products on this CPU go to oneDNN instead of MKL.

    MKL keeps its AVX-512 kernels to Intel's processors; oneDNN does not, and is about twice as fast on an AMD EPYC
    (``benchmarks/bench_sparse_peft.py`` prints the ratio). ``SQFT_CPU_PRODUCT=mkl`` or ``onednn`` decides otherwise.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    choice = os.environ.get("SQFT_CPU_PRODUCT", "")
    if choice in ("mkl", "onednn"):
        return choice == "onednn"
    return torch.backends.mkl.is_available() and _processor_vendor() == "AuthenticAMD"


def cpu_kernels_wanted() -> bool:
    """Whether C++ kernels may be compiled and loaded: unless ``SQFT_CPU_KERNELS=off``."""
    return os.environ.get("SQFT_CPU_KERNELS", "") != "off"


def cpu_kernel_options() -> list[str]:
    """More options for the C++ compiler: ``SQFT_CPU_OPTIONS``, e.g. ``-fsanitize=address`` (``make asan``)."""
    return os.environ.get("SQFT_CPU_OPTIONS", "").split()


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/sqft`` or ``~/.cache/sqft``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqft"


def _processor_vendor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


@functools.cache
def is_slow_half(dtype: torch.dtype) -> bool:
    """Whether this processor has no units for a half-precision dtype, so that float32 is faster."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    name = "fp16" if dtype == torch.float16 else "bf16"
    has = torch.cpu.get_capabilities()
    if has.get("architecture") == "x86_64":
        return not (has.get(f"avx512_{name}") or has.get(f"amx_{name}"))
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


_widening = [0]  # how many have asked for it


@contextlib.contextmanager
def widening() -> Iterator[None]:
    """Within it, halves that this processor has no units for are multiplied in float32 by ``like_linear`` too."""
    _widening[0] += 1
    try:
        yield
    finally:
        _widening[0] -= 1


def like_linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """``product`` as an ``nn.Linear`` of these computes it here and now."""
    wide = _widening[0] and x_TI.device.type == "cpu" and is_slow_half(x_TI.dtype)
    return (product if wide else F.linear)(x_TI, w_OI, bias_O)


def cpu_product(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """``product`` by MKL or oneDNN, whichever is faster."""
    if is_slow_half(x_TI.dtype):
        bias_O = None if bias_O is None else bias_O.float()
        return cpu_product(x_TI.float(), w_OI.float(), bias_O).to(x_TI.dtype)
    if x_TI.dtype == torch.float32 and use_onednn():
        if not (w_OI.is_contiguous() or w_OI.mT.is_contiguous()):  # a slice: oneDNN's reference code, 1000 times slower
            w_OI = w_OI.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x_TI, w_OI, bias_O, "none", [], "")
    return F.linear(x_TI, w_OI, bias_O)


def product(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x w^T + bias`` -> [T, O], for tensors of one dtype and any strides, by the fastest library. No autograd."""
    return kernel("product", x_TI.device.type)(x_TI, w_OI, bias_O)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adapters and masked products of half-precision weights are computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of a weight's rows that are built one after the other."""
    step = max(1, CHUNK_ELEMENTS.get(device.type, LARGE_CHUNK) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def release_memory() -> None:
    """Hands freed memory back to the system: glibc keeps tensors' pieces, which add up when sizes alternate."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    trim(0)


class Peak:
    """``bytes`` of the accelerator if there is one that counts them, else resident bytes of this process (with the
    interpreter and what was loaded before); None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures from here to the end of the block."""
    release_memory()  # what earlier work left is not this work's
    peak = Peak()
    with contextlib.suppress(RuntimeError):  # there is no accelerator, or it does not count
        torch.accelerator.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        _RESET.write_text("5")  # the kernel's highest resident size starts anew
    try:
        yield peak
    finally:
        peak.bytes = _highest_resident()
        with contextlib.suppress(RuntimeError):
            peak.bytes = torch.accelerator.max_memory_allocated()


def _highest_resident() -> int | None:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
