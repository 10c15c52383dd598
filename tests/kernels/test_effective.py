"""The weight that stands for a stored matrix and its rotations, and its gradients, against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from oracle import explicit_weight
from strategies import OwningFactor, factors, normal
from torch import Tensor, nn

from poetx_compile import PoetxConfig, stand_in
from poetx_compile.base import BASES
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import LINEAR_VERSION, Made, effective, lean_linear, lean_weight
from poetx_compile.kernels.quantize import GROUP, dequantize, quantize_
from poetx_compile.retraction import retract_all

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def full(turn: Tensor | None, channels: Tensor, features: int) -> Tensor:
    """The orthogonal matrix of a whole side, float64."""
    g = torch.eye(features, dtype=torch.float64)
    for block, inside in zip(
        [] if turn is None else turn.cpu(), channels.cpu().split(1 if turn is None else turn.shape[-1])
    ):
        g[inside[:, None], inside] += block.double()
    return g


def explicit(made: Made) -> Tensor:
    stored = made.stored.cpu()
    base = stored.double() if made.scales is None else dequantize(stored, made.scales.cpu(), torch.float64)
    m, n = stored.shape
    return full(made.rows, made.row_channels, m) @ base @ full(made.columns, made.column_channels, n)


def operands(
    shape: tuple[int, int] = (48, 300),
    dtype: torch.dtype = torch.float32,
    storage: str = "int8",
    device: str = "cpu",
    sides: str = "both",
    width: int = 16,
) -> Made:
    """A stored matrix with left-over channels, and one rotation of each side, not a small one."""
    m, n = shape
    matrix = normal(m, n, seed=0, dtype=dtype)
    if storage == "int8":
        stored, scales = torch.empty(m, n, dtype=torch.int8), torch.empty(m, -(-n // GROUP), dtype=torch.bfloat16)
        quantize_(stored, scales, matrix)
    else:
        stored, scales = matrix, None
    master = torch.float64 if dtype == torch.float64 else torch.float32

    def side(features: int, seed: int, is_turned: bool) -> tuple[Tensor | None, Tensor]:
        count = features // width if is_turned else 0
        channels = torch.randperm(features, generator=torch.Generator().manual_seed(seed))[: count * width]
        turn = torch.linalg.qr(normal(count, width, width, seed=seed)).Q if count else None
        return (None if turn is None else (turn - torch.eye(width, dtype=torch.float64)).to(master)), channels

    rows, row_channels = side(m, 1, sides in ("both", "rows"))
    columns, column_channels = side(n, 2, sides in ("both", "columns"))
    made = Made(stored, scales, rows, row_channels, columns, column_channels, dtype, 1, "tf32x3")
    return Made(*(value.to(device) if isinstance(value, Tensor) else value for value in made))


@on_devices
@pytest.mark.parametrize("sides", ["both", "rows", "columns", "neither"])
@pytest.mark.parametrize("storage", ["int8", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 300), (50, 128), (16, 33)], ids=str)
def test_it_is_the_product_of_three_matrices(
    shape: tuple[int, int], dtype: torch.dtype, storage: str, sides: str, device: str
) -> None:
    made = operands(shape, dtype, storage, device, sides)
    got, wanted = made.weight(), explicit(made)
    assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, shape, True)
    rounding = 0 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps
    allowed = rounding * wanted.abs() + (1e-12 if dtype == torch.float64 else 3e-6)
    if (device, dtype, sides) == ("cuda", torch.bfloat16, "both"):
        allowed += 2.0**-16 * wanted.abs().max()  # the first side's result is kept in 16 bits for the second
    assert ((got.cpu().double() - wanted).abs() <= allowed).all()
    assert torch.equal(got, made.weight(after=torch.full((3,), torch.nan, device=device)))


@on_devices
def test_the_operands_stay(device: str) -> None:
    made = operands(dtype=torch.bfloat16, device=device)
    before = [value.clone() for value in made if isinstance(value, Tensor)]
    made.weight()
    assert all(torch.equal(*pair) for pair in zip(before, [value for value in made if isinstance(value, Tensor)]))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["int8", "lean"])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
def test_whole_blocks_of_256_on_a_gpu(storage: str, precision: str) -> None:
    made = operands((512, 768), torch.bfloat16, storage, "cuda", width=256)._replace(precision=precision)
    got, wanted = made.weight().cpu().double(), explicit(made)
    assert ((got - wanted).norm() / wanted.norm()) < 2**-9


def test_opcheck() -> None:
    for made in (operands(), operands(storage="lean", sides="rows"), operands(dtype=torch.bfloat16)):
        torch.library.opcheck(effective, (*made, torch.ones(2)))


def arguments(factor: OrthogonalFactor, q: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What both ops take: operands, and settings."""
    *made, dtype, _, precision = factor.made()
    sides = factor.rows, factor.columns
    widths, runs = (side.width for side in sides), (side.run for side in sides)
    return (*made, q, dtype, precision), (*widths, factor.config.scale, LINEAR_VERSION, *runs)


def lean(factor: OwningFactor, storage: str) -> OwningFactor:
    """The same factor with its weight stored lean, after one large rotation."""
    from poetx_compile.registry import factors as registry

    registry.add(factor)
    factor.storage = storage
    stand_in.pack([factor])
    with torch.no_grad():
        factor.q.copy_(normal(factor.q.numel(), seed=9) * 0.3)
    retract_all([(factor, 1.0)])
    return factor


@pytest.mark.parametrize("storage", BASES)
@given(drawn=factors())
def test_gradients_are_those_of_the_explicit_weight(storage: str, drawn: OwningFactor) -> None:
    factor = lean(drawn, storage)
    weight = stand_in.values(factor.weight)
    m, n = weight.shape
    x, bias = normal(7, n, seed=1), normal(m, seed=2)
    probe = normal(7, m, seed=3)

    def run(kind: str) -> list[Tensor]:
        q, inputs, c = (
            torch.zeros_like(factor.q, requires_grad=True),
            x.clone().requires_grad_(),
            bias.clone().requires_grad_(),
        )
        given, settings = arguments(factor, q)
        *made, _, dtype, precision = given
        if kind == "explicit":
            y = nn.functional.linear(inputs, explicit_weight(factor, weight, q), c)
        elif kind == "weight":
            y = nn.functional.linear(inputs, lean_weight(*given, *settings), c)
        else:
            y = lean_linear(inputs, *made, c, q, dtype, precision, *settings[:3], False, *settings[3:])
        (y * probe).sum().backward()
        return [y.detach(), q.grad, inputs.grad, c.grad]

    wanted = run("explicit")
    for kind in ("weight", "linear"):
        for got, right in zip(run(kind), wanted):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_transposed_product_has_the_right_gradients(with_bias: bool) -> None:
    factor = lean(OwningFactor(nn.Parameter(normal(32, 50, seed=1)), "w", PoetxConfig(block_size=16, chunk=4)), "int8")
    weight = stand_in.values(factor.weight)
    results = []
    for kind in ("explicit", "linear"):
        q = torch.zeros_like(factor.q, requires_grad=True)
        x = normal(7, 32, seed=1).requires_grad_()
        c = normal(50, seed=2).requires_grad_() if with_bias else None
        given, settings = arguments(factor, q)
        *made, _, dtype, precision = given
        if kind == "explicit":
            product = x @ explicit_weight(factor, weight, q)
            y = product if c is None else product + c
        else:
            y = lean_linear(x, *made, c, q, dtype, precision, *settings[:3], True, *settings[3:])
        y.square().sum().backward()
        results.append([y.detach(), q.grad, x.grad, *([] if c is None else [c.grad])])
    for got, right in zip(*results):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


def test_operands_of_two_dtypes_are_refused_as_by_torch() -> None:
    factor = lean(OwningFactor(nn.Parameter(normal(32, 50, seed=1)), "w", PoetxConfig(block_size=16, chunk=4)), "int8")
    given, settings = arguments(factor, factor.q)
    *made, q, dtype, precision = given
    with pytest.raises(RuntimeError, match="of one dtype"):
        lean_linear(torch.ones(2, 50), *made, None, q, dtype, precision, *settings[:3], False, *settings[3:])
