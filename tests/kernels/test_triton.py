"""The Triton kernels without a GPU: their results by interpretation, and that they compile for every GPU we name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from poetx_compile.kernels import triton_cayley, triton_gram, triton_rotate

TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

HALF = {"left": "*bf16", "right": "*bf16", "channels": "*i64", "partial": "*fp32"}
COUNTS = {"tokens": "i32", "left_stride": "i32", "right_stride": "i32", "tokens_per_split": "i32"}
ROTATED = {"weight": "*bf16", "residual": "*i8", "rotation": "*fp32", "channels": "*i64", "n": "i32"}
ROTATION = {"WIDTH": 256, "PADDED": 256, "ACROSS": 64, "ALONG": 32, "KIND": 1}
CAYLEY = {"skew": "*fp32", "rotation": "*fp32", "scratch": "*fp32", "blocks": "i32", "scale": "fp32"}

# kernel: function, types of its arguments, constants, warps, stages, whether it multiplies float32
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int, int, bool]] = {
    "gram": (
        triton_gram._gram_kernel,
        HALF | COUNTS,
        {"WIDTH": 256, "RUN": 16, "TILE_I": 128, "TILE_J": 256, "TILE_T": 32, "PRECISION": "ieee"},
        8,
        3,
        False,
    ),
    "pack": (
        triton_gram._pack_kernel,
        {"partial": "*fp32", "packed": "*fp32", "splits": "i32"},
        {"WIDTH": 256, "TILE": 64},
        4,
        2,
        False,
    ),
    "rotate rows": (triton_rotate._rotate_rows_kernel, ROTATED, ROTATION, 8, 2, True),
    "rotate columns": (triton_rotate._rotate_columns_kernel, ROTATED | {"m": "i32"}, ROTATION | {"RUN": 16}, 8, 2, True),
    "cayley": (
        triton_cayley._cayley_kernel,
        CAYLEY,
        {"WIDTH": 256, "SIDE": 256, "TILE": 128, "TILE_K": 32, "BUFFERS": 5, "LARGEST": 3.0, "TOLERANCE": 1e-7},
        8,
        2,
        True,
    ),
}


def test_by_interpreter() -> None:
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_within_shared_memory(kernel: str, target: str) -> None:
    function, types, constants, warps, stages, multiplies = KERNELS[kernel]
    gpu, limit = TARGETS[target]
    if multiplies:  # AMD's matrix units take float32 as it is
        constants = constants | {"PRECISION": "tf32x3" if gpu.backend == "cuda" else "ieee"}
    names = function.arg_names
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in ("n", "left_stride", "right_stride")]
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    assert compiled.metadata.shared <= limit
