"""Compiles the Triton kernels for a GPU that need not be there, and prints their registers and spills as JSON:
{"kernel, case": [registers, bytes]}. Run with TRITON_INTERPRET=0.

    python tests/support/compile_triton.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sqft.kernels.triton import columns, gradients, products, weights

POINTERS = {
    "q_ptr": "*i32", "z_ptr": "*i32", "group_ptr": "*i32", "scale_ptr": "*fp16", "own_ptr": "*fp32", "ratio_ptr": "*fp32",
    "f_ptr": "*i8", "w_ptr": "*bf16", "mask_ptr": "*u8", "a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*bf16",
    "g_ptr": "*bf16", "u_ptr": "*fp32", "zero_ptr": "*fp32", "e_ptr": "*fp32", "da_ptr": "*fp32", "db_ptr": "*fp32", "s": "fp32", "scale": "fp32",
}  # fmt: skip
# Where these names are other tensors.
OTHERS = {columns.kernel: {"w_ptr": "*fp32", "scale_ptr": "*fp32", "q_ptr": "*u8", "largest": "fp32"},
          products.compact_kernel: {"x_ptr": "*bf16", "y_ptr": "*bf16", "mask_ptr": "*i64", "starts_ptr": "*i64", "scale_ptr": "*fp32",
                                    "zero_ptr": "*u8"}}  # fmt: skip
COMPACT = {"BT": 16, "BO": products.ROWS, "WIDTH": products.WIDTH, "PRECISION": "tf32"}
GRID = {"BITS": 4, "G_IDX": False, "RATIO": False, "FRACTIONS": False, "BASE": False, "STEPS": False}
CONTRACT = {"PRECISION": "tf32", "BR": 32}
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("build, float", weights.float_kernel, {"BASE": True}),
    ("de-quantize, 4 bits", weights.integer_kernel, {"BITS": 4, "G_IDX": False}),
    ("de-quantize, 3 bits", weights.integer_kernel, {"BITS": 3, "G_IDX": False}),
    ("build, INT4", weights.grid_kernel, GRID),
    ("build, INT4, fractions", weights.grid_kernel, GRID | {"FRACTIONS": True}),
    ("contract, float", gradients.float_kernel, CONTRACT),
    ("contract, float, rank 64", gradients.float_kernel, CONTRACT | {"BR": 64}),
    ("contract, INT4", gradients.grid_kernel, GRID | CONTRACT),
    ("round columns", columns.kernel, {"MASK": True, "PROPAGATE": True, "BS": 128, "BO": columns.BO}),
    ("product, compact INT4", products.compact_kernel, COMPACT | {"BITS": 4}),
    ("product, compact INT4, 64 tokens", products.compact_kernel, COMPACT | {"BITS": 4, "BT": 64}),
    ("product, compact floats", products.compact_kernel, COMPACT | {"BITS": 0}),
    ("contract, INT4, fractions", gradients.grid_kernel, GRID | CONTRACT | {"FRACTIONS": True}),
]


def resources(function: Any, constants: dict[str, Any], capability: int) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory, where spilt ones go."""
    constants = {name: value for name, value in {**weights.TILE, **constants}.items() if name in function.arg_names}
    pointers = POINTERS | OTHERS.get(function, {})
    if function is products.compact_kernel:
        pointers["values_ptr"] = "*u8" if constants["BITS"] else "*bf16"
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=weights.OPTIONS)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(made.asm["cubin"])
        command = [str(tool), "-res-usage", "kernel.cubin"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2]) + int(found[3])


print(json.dumps({name: resources(kernel, constants, int(sys.argv[1])) for name, kernel, constants in CASES}))
