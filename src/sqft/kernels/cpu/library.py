"""The C++ kernels of this folder: compiled on first use, for this torch, and kept in the user's cache. Without a
compiler (or with ``SQFT_CPU_KERNELS=off``) the reference computes."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from sqft.errors import Note
from sqft.kernels import compact
from sqft.kernels.compact import WIDTH, CompactWeight
from sqft.kernels.dispatch import cache_folder, cpu_kernel_options, cpu_kernels_wanted

SOURCE = Path(__file__).with_name("library.cpp")
VARIANTS = ("portable", "avx2", "avx512")  # as the library counts them
FEW_TOKENS = 1024  # up to so many, weights are decoded for each eight of them; else once, and multiplied as a matrix


@functools.cache
def library() -> bool:
    """Loads the kernels, after compiling them if need be; whether they are there. Says once why not."""
    if not cpu_kernels_wanted():
        return False
    try:
        torch.ops.load_library(str(build()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        said = f"the C++ kernels are not there, plain torch computes, slower: {detail.strip()[-300:]}"
        warnings.warn(said, Note, stacklevel=2)
        return False
    return True


def build() -> Path:
    """The compiled library of this source and torch. Raises OSError without a compiler or a writable cache,
    CalledProcessError if it does not compile."""
    from torch.utils import cpp_extension

    compiler = shutil.which(os.path.basename(cpp_extension.get_cxx_compiler()))
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++) was found")
    sources = b"".join(file.read_bytes() for file in [*sorted(SOURCE.parent.glob("*.h")), SOURCE])
    more = cpu_kernel_options()
    name = hashlib.sha256(sources + " ".join([torch.__version__, *more]).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{name}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=library.parent) as work,
        tqdm(total=2, desc="Compile kernels, once", unit="step", disable=None) as bar,
    ):
        compiled, linked = Path(work) / "kernels.o", Path(work) / "kernels.so"
        options = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", *(f"-I{path}" for path in cpp_extension.include_paths()),
                   *more]  # fmt: skip
        _run([compiler, "-c", *options, str(SOURCE), "-o", str(compiled)])
        bar.update()
        # Not -fopenmp here: what it needs is torch's own, so that there is one pool of threads.
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run([compiler, "-shared", str(compiled), *paths, "-lc10", "-ltorch_cpu", *more, "-o", str(linked)])
        bar.update()
        os.replace(linked, library)
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 (no shell, nothing from outside)


def variant() -> int:
    """The fastest one that this processor runs."""
    return torch.ops.sqft_cpu.best_variant()


def stores_zeros(bits: int, group: int) -> bool:
    """Whether a weight is multiplied faster here when its zeros are stored too: of 4 bits without AVX-512, whose
    registers expand by a mask."""
    return bits == 4 and group % WIDTH == 0 and library() and variant() == VARIANTS.index("avx2")


def compact_linear(x_TI: Tensor, weight: CompactWeight) -> Tensor:
    """``compact.linear`` -> [T, O]: by the C++ kernel for a few tokens, if it takes the weight; else the reference.

    Sums are in float32. Of integers the AVX-512 variant, and of those of 4 bits in groups that 64 divides the AVX2 one,
    rounds x to 16 bits in groups of 64 columns, which errs by at most 2^-16 of the group's largest.
    """
    if len(x_TI) > FEW_TOKENS or x_TI.dtype == torch.float64 or not takes(weight) or not library():
        return compact.linear(x_TI, weight)
    return run(x_TI, weight, variant())


def takes(weight: CompactWeight) -> bool:
    """Whether there is a kernel: for halves, and integers of 4 or 8 bits in groups that 32 divides."""
    if not weight.compact.bits:
        return weight.compact.values.dtype in (torch.float16, torch.bfloat16)
    return weight.compact.bits in (4, 8) and weight.group % 32 == 0


def run(x_TI: Tensor, weight: CompactWeight, variant: int) -> Tensor:
    """The kernel itself, in the given variant."""
    mask_OB, values, inputs, bits = weight.compact
    x = F.pad(x_TI.float(), (0, -inputs % WIDTH)).contiguous()
    y = torch.ops.sqft_cpu.compact_linear(x, mask_OB, values, weight.starts, weight.scale_OG, weight.zero_OG, bits,
                                          weight.group, variant)  # fmt: skip
    return y.to(x_TI.dtype)
