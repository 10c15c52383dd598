"""The Triton kernels without a GPU: their results by interpretation, and that they compile for every GPU we name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from poetx_compile.kernels import (
    gluon_effective,
    gluon_polar,
    gluon_rotate,
    triton_cayley,
    triton_gram,
    triton_rotate,
    triton_series,
    triton_unpack,
)
from poetx_compile.kernels.precision import PRECISIONS
from poetx_compile.kernels.tuning import TABLES, GramTiles, RotateTiles

TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
SINGLE = {name: "i32" for name in ("tokens", "tokens_per_split", "splits", "first_biased", "biased", "blocks_0", "blocks")}
TYPES = SINGLE | {
    **{
        f"{name}_{side}": kind
        for side in (0, 1)
        for name, kind in (("left", "*bf16"), ("right", "*bf16"), ("channels", "*i64"))
    },
    **{f"{name}_stride_{side}": "i32" for side in (0, 1) for name in ("left", "right")},
    **{name: "*fp32" for name in ("partial", "packed", "bias_grad", "skew", "scratch", "norms")},
    **{name: "*fp16" for name in ("rotation", "omega", "square", "lead", "series")},
    **{"codes": "*i8", "scales": "*bf16", "n": "i32", "groups": "i32"},
    **{"distances": "*i64", "weight": "*bf16", "residual": "*i8", "bias": "*bf16", "channels": "*i64"},
    **{"scale": "fp32", "size": "i32", "stride": "i32", "channel_stride": "i32"},
}
"""Of every argument that a kernel has by this name."""

SERIES = {"WIDTH": 256, "TILE": 128, "TILE_K": 64}
WIDE = SERIES | {"WIDTH": 1280}
FAR = {"SIDE": 256, "TILE": 128, "TILE_K": 32, "BUFFERS": 4, "LARGEST": 3.0, "TOLERANCE": 1e-7, "NEAR": 0.03, "UNIT": 4096.0}

# kernel: function, constants, warps, stages
FIXED: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    "pack": (triton_gram._pack_kernel, {"WIDTH": 256, "TILE": 64, "HAS_BIAS": True}, 4, 2),
    "unpack": (triton_series._unpack_kernel, {"WIDTH": 256, "TILE": 64}, 4, 2),
    "square": (triton_series._square_kernel, SERIES, 4, 3),
    "series": (triton_series._series_kernel, SERIES | {"C1": 0.9, "C2": 0.8}, 4, 3),
    "turn": (triton_series._turn_kernel, SERIES | {"C0": 1.0}, 4, 3),
    "codes": (triton_unpack._unpack_kernel, {"GROUP": 128, "COLUMNS": 1024, "KIND": 1}, 4, 2),
    "far": (triton_cayley._far_kernel, FAR | {"WIDTH": 256, "TILES": 2, "NORM_TILE": 128}, 8, 2),
    "wide series": (triton_series._series_kernel, WIDE | {"C1": 0.9, "C2": 0.8}, 4, 3),
    "wide far": (triton_cayley._far_kernel, FAR | {"WIDTH": 1280, "SIDE": 1280, "TILES": 10, "NORM_TILE": 128}, 8, 2),
}


def compiled(
    target: str, function: Any, constants: dict[str, Any], warps: int, stages: int, kind: Any = ASTSource, **types: str
) -> Any:
    gpu, limit = TARGETS[target]
    if function is triton_cayley._far_kernel:
        constants = constants | {"PRECISION": triton_cayley.far_precision("tf32x3", gpu.backend == "hip")}
    names = function.arg_names
    given = {name: (TYPES | types)[name] for name in names if name not in constants}
    aligned = [name for name, kind in given.items() if kind.startswith("*") or "stride" in name or name == "size"]
    source = kind(
        function,
        {name: given.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    result = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    assert result.metadata.shared <= limit
    return result


def test_by_interpreter() -> None:
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FIXED)
def test_compiles_within_shared_memory(kernel: str, target: str) -> None:
    compiled(target, *FIXED[kernel])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", (128, 256, 512, 1280))
def test_gram_compiles_with_the_tiles_of_the_table(target: str, width: int) -> None:
    tiles = TABLES.get(target, TABLES["other"])[f"gram/{min(width, 512)}"]
    assert isinstance(tiles, GramTiles)
    constants = {"WIDTH": width, "RUN": 32, "TILE_I": tiles.i, "TILE_J": tiles.j, "TILE_T": tiles.t}
    compiled(target, triton_gram._gram_kernel, constants, tiles.warps, tiles.stages)


def rotation(target: str, precision: str, width: int, side: str, kind: int = 1) -> Any:
    """The kernel for one side, compiled with the tiles of the table; ``kind`` as in :data:`triton_rotate.KINDS`."""
    tiles = TABLES.get(target, TABLES["other"])[f"{side}/{precision}/{width}"]
    assert isinstance(tiles, RotateTiles)
    constants = {"WIDTH": width, "PADDED": width, "ACROSS": tiles.across, "ALONG": tiles.along, "KIND": kind}
    constants |= {"PRECISION": precision, "TRANSPOSED": side == "columns", "RUN": 32 if side == "columns" else 1}
    constants |= {"channel_stride": 1} if side == "columns" else {"stride": 1}
    types = {"rotation": "*fp16" if precision == "tf32" else "*fp32", "weight": ("*fp32", "*bf16", "*fp16")[kind]}
    return compiled(target, triton_rotate._rotate_kernel, constants, tiles.warps, tiles.stages, **types)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", (256, 512))
@pytest.mark.parametrize("side", ("rows", "columns"))
def test_rotation_compiles_with_the_tiles_of_the_table(target: str, precision: str, width: int, side: str) -> None:
    rotation(target, precision, width, side)


@pytest.mark.parametrize("kind", (0, 1))
@pytest.mark.parametrize("precision", ("tf32x3", "ieee"))
@pytest.mark.parametrize("width", (256, 512))
@pytest.mark.parametrize("side", ("rows", "columns"))
def test_rotation_stays_in_registers_on_hopper(precision: str, width: int, side: str, kind: int, tmp_path: Path) -> None:
    """ptxas gives up where a tile is a little too large: 32 registers, all else in memory, and a kernel many times slower."""
    code = tmp_path / "kernel.cubin"
    code.write_bytes(rotation("sm90", precision, width, side, kind).asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(code)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    (registers,) = re.findall(r"REG:(\d+)", told.stdout + told.stderr)
    assert int(registers) > 32


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize(("m", "n"), ((256, 256), (256, 128), (128, 256), (128, 128)))
def test_both_sides_in_one_pass_compile_for_hopper(m: int, n: int, dtype: str) -> None:
    constants = {"M": m, "N": n, "RUN": 32, "KIND": 1 if dtype == "bf16" else 2, "WARPS": m // 16}
    types = {"weight": f"*{dtype}", "rows": "*fp16", "columns": "*fp16", "row_channels": "*i64", "column_channels": "*i64"}
    kernel = gluon_rotate._rotate_kernel
    compiled("sm90", kernel, constants, m // 16, 1, GluonASTSource, **types)
    kernel = gluon_effective._effective_kernel
    del constants["KIND"]
    for stored in ("i8", dtype):
        types |= {"stored": f"*{stored}", "out": f"*{dtype}"}
        compiled("sm90", kernel, constants | {"IS_CODED": stored == "i8"}, m // 16, 1, GluonASTSource, **types)


def test_even_steps_compile_for_hopper() -> None:
    constants = {name: 0.0 for name in ("LEAST", "LEAST_BOUND")} | {"POLYNOMIALS": gluon_polar.POLYNOMIALS, "WARPS": 8}
    compiled("sm90", gluon_polar._spread_kernel, constants, 8, 1, GluonASTSource, out="*fp32")


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (1, None),
        (1, torch.zeros(256, 128, dtype=torch.uint8)),  # of 4 bits
        (2, None),
        (2, torch.zeros(1, 256, 256)),
        (4, torch.zeros(4, 64, 64, dtype=torch.float16)),
        (4, torch.zeros(1, 128, 128, dtype=torch.float16)),  # some columns stay
        (0, torch.zeros(256, 512, dtype=torch.bfloat16)[:, ::2]),
        (0, torch.zeros(2 * 256 * 256, dtype=torch.bfloat16)[1 : 1 + 256 * 256].view(256, 256)),
    ],
    ids=str,
)
def test_one_pass_is_for_weights_that_its_kernel_can_read(place: int, other: torch.Tensor | None) -> None:
    operands: list[torch.Tensor | None] = [
        torch.zeros(256, 256, dtype=torch.bfloat16),
        torch.zeros(256, 256, dtype=torch.int8),
        torch.zeros(1, 256, 256, dtype=torch.float16),
        torch.arange(256),
        torch.zeros(2, 128, 128, dtype=torch.float16),
        torch.arange(256),
    ]
    assert gluon_rotate.serves(operands, 16)
    assert not gluon_rotate.serves(operands, 8)
    operands[place] = other
    assert not gluon_rotate.serves(operands, 16)


COUNTS = {
    triton_gram._gram_kernel: ("tokens", "tokens_per_split", "blocks_0"),
    triton_gram._pack_kernel: ("splits", "first_biased", "biased"),
    triton_cayley._far_kernel: ("blocks",),
    triton_unpack._unpack_kernel: ("groups",),
    gluon_effective._effective_kernel: ("groups",),
}


def variant(kernel: Any, **given: int) -> Any:
    """What Triton compiles a kernel for, where it is launched with these arguments, and others that are always the same."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm90"][0]))
    pointer = torch.empty(64)
    usual = {
        param.name: pointer if TYPES.get(param.name, "*").startswith("*") and not param.is_constexpr else 32
        for param in kernel.params
    }
    return bind(**usual | given)[1]


@pytest.mark.parametrize("kernel", COUNTS, ids=lambda kernel: kernel.__name__)
def test_one_variant_serves_all_counts(kernel: Any) -> None:
    variants = [variant(kernel, **dict.fromkeys(COUNTS[kernel], count)) for count in (0, 1, 7, 64)]
    assert all(other == variants[0] for other in variants)


def test_a_variant_knows_whether_rows_are_aligned() -> None:
    assert variant(triton_gram._gram_kernel) != variant(triton_gram._gram_kernel, left_stride_0=33)
