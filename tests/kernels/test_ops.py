"""The operations as torch sees them: schemas, fake tensors, devices, determinism and the user's precision settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from strategies import normal
from torch import Tensor

from poetx_compile.kernels import (
    HALF,
    LINEAR_VERSION,
    block_gram,
    cayley_neumann,
    decode,
    naive,
    rotate_,
    rotated_linear,
    spread_evenly,
)
from poetx_compile.kernels.precision import full_precision
from poetx_compile.layout import BlockLayout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float64, torch.float32, *HALF)
SIDES = ("rows", "columns", "both")
ROWS, COLUMNS = BlockLayout.of(72, 32, 8), BlockLayout.of(104, 32, 8)

on_devices = pytest.mark.parametrize("device", DEVICES)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def channels(device: str) -> tuple[Tensor, Tensor]:
    return ROWS.channels(1, 0, 0).to(device), COLUMNS.channels(1, 1, 0).to(device)


def gram_args(device: str, dtype: torch.dtype, tokens: int = 50) -> tuple[Any, ...]:
    left, right = (normal(tokens, COLUMNS.features, seed=seed, dtype=dtype, device=device) for seed in range(2))
    return [left], [right], [channels(device)[1]], [COLUMNS.width], [COLUMNS.run]


def skew_args(device: str, dtype: torch.dtype, layout: BlockLayout = COLUMNS) -> tuple[Any, ...]:
    return normal(layout.skew, seed=2, dtype=dtype, device=device), layout.width, 0.02


def rotate_args(device: str, dtype: torch.dtype, sides: str = "both") -> tuple[Any, ...]:
    """A fresh weight each time."""
    weight = normal(ROWS.features, COLUMNS.features, seed=3, dtype=dtype, device=device)
    residual = torch.zeros_like(weight, dtype=torch.int8) if dtype in HALF else None
    skew_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    row_channels, column_channels = channels(device)
    return (
        weight,
        residual,
        naive.cayley_neumann(*skew_args(device, skew_dtype, ROWS)) if sides != "columns" else None,
        row_channels,
        naive.cayley_neumann(*skew_args(device, skew_dtype, COLUMNS)) if sides != "rows" else None,
        column_channels,
    )


def linear_args(device: str, dtype: torch.dtype, tokens: int = 50) -> tuple[Any, ...]:
    """Of a layer with 104 inputs and 72 outputs; input, bias and ``q`` take gradients."""
    x = normal(tokens, COLUMNS.features, seed=4, dtype=dtype, device=device)
    weight = normal(ROWS.features, COLUMNS.features, seed=5, dtype=dtype, device=device)
    bias = normal(ROWS.features, seed=6, dtype=dtype, device=device)
    skew_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    q = torch.zeros(ROWS.skew + COLUMNS.skew, dtype=skew_dtype, device=device)
    return (
        x.requires_grad_(),
        weight,
        bias.requires_grad_(),
        q.requires_grad_(),
        *channels(device),
        ROWS.width,
        COLUMNS.width,
        1.5,
        False,
        LINEAR_VERSION,
    )


def linear_with_gradients(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    args = linear_args(device, dtype)
    y = rotated_linear(*args)
    cotangent = normal(*y.shape, seed=7, dtype=dtype, device=device)
    return y.detach(), *torch.autograd.grad(y, (args[0], args[2], args[3]), cotangent)


# --- What torch checks -----------------------------------------------------------------------------------------------


@on_devices
@of_dtypes
def test_block_gram_passes_opcheck(device: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(block_gram, gram_args(device, dtype))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cayley_neumann_passes_opcheck(device: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(cayley_neumann, skew_args(device, dtype))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_spread_evenly_passes_opcheck(device: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(spread_evenly, skew_args(device, dtype)[:2])


@on_devices
@of_dtypes
@pytest.mark.parametrize("sides", SIDES)
def test_rotate_passes_opcheck(device: str, dtype: torch.dtype, sides: str) -> None:
    torch.library.opcheck(rotate_, rotate_args(device, dtype, sides))


@on_devices
@of_dtypes
def test_linear_passes_opcheck(device: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(rotated_linear, linear_args(device, dtype))


@on_devices
def test_rotate_tells_autograd_of_its_write(device: str) -> None:
    args = rotate_args(device, torch.bfloat16)
    versions = [args[0]._version, args[1]._version]
    rotate_(*args)
    assert args[0]._version > versions[0]
    assert args[1]._version > versions[1]


@on_devices
def test_an_unknown_precision_is_refused(device: str) -> None:
    args = rotate_args(device, torch.bfloat16)
    before = args[0].clone()
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32x3, tf32, not 'half'"):
        rotate_(*args, 1, "half")
    with pytest.raises(ValueError, match="precision must be one of"):
        cayley_neumann(*skew_args(device, torch.float32), "half")
    assert torch.equal(args[0], before)


@on_devices
@of_dtypes
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_a_bias_in_any_memory_layout(device: str, dtype: torch.dtype, layout: str) -> None:
    sides = gram_args(device, dtype)
    held = normal(2 * COLUMNS.features, seed=9, dtype=dtype, device=device)
    bias = held[::2] if layout == "strided" else held[:1].expand(COLUMNS.features)
    total = sides[0][0].sum(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = block_gram(*sides, 1.0, bias, total)
    assert torch.equal(got, block_gram(*sides, 1.0, bias.contiguous(), total))


# --- The same bits each time -----------------------------------------------------------------------------------------


@on_devices
@of_dtypes
def test_block_gram_is_deterministic(device: str, dtype: torch.dtype) -> None:
    args = gram_args(device, dtype, tokens=4096)
    assert torch.equal(block_gram(*args), block_gram(*args))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cayley_neumann_is_deterministic(device: str, dtype: torch.dtype) -> None:
    args = skew_args(device, dtype)
    assert torch.equal(cayley_neumann(*args), cayley_neumann(*args))


@on_devices
@of_dtypes
def test_rotate_is_deterministic(device: str, dtype: torch.dtype) -> None:
    first, second = rotate_args(device, dtype), rotate_args(device, dtype)
    rotate_(*first)
    rotate_(*second)
    assert torch.equal(first[0], second[0])
    assert first[1] is None or torch.equal(first[1], second[1])


@on_devices
@of_dtypes
def test_linear_is_deterministic(device: str, dtype: torch.dtype) -> None:
    for first, second in zip(linear_with_gradients(device, dtype), linear_with_gradients(device, dtype)):
        assert torch.equal(first, second)


# --- Every device computes what the plain kernels compute in float64 on the CPU --------------------------------------


@on_devices
@of_dtypes
@pytest.mark.parametrize("tokens", [0, 1, 50, 3000])
def test_block_gram_on_a_device(device: str, dtype: torch.dtype, tokens: int) -> None:
    args = gram_args(device, dtype, tokens)
    left, right, blocks, width = (operands[0] for operands in args[:4])
    result = block_gram(*args)
    exact = naive.block_gram(left.double().cpu(), right.double().cpu(), blocks.cpu(), width)
    lengths = left.double().norm(dim=0).amax() * right.double().norm(dim=0).amax() if tokens else torch.zeros(())
    rounding = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    assert ((result.double().cpu() - exact).abs() <= (tokens + 2) * rounding * lengths.cpu()).all()


@on_devices
@pytest.mark.parametrize("size", [1e-3, 0.02, 0.1, 10.0])
@pytest.mark.parametrize("features", [2, 24, 72, 256])
def test_cayley_neumann_on_a_device(device: str, features: int, size: float) -> None:
    skew = normal(2 * features * (features - 1) // 2, seed=8, dtype=torch.float32, device=device)
    result = cayley_neumann(skew, features, size)
    exact = naive.cayley_neumann(skew.double().cpu(), features, size)
    e = result.double().cpu()
    assert (e - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert torch.linalg.matrix_norm(e + e.mT + e.mT @ e, 2).max() <= 2e-6


@on_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_cayley_neumann_on_a_device_spares_blocks_that_are_not_finite(device: str, bad: float) -> None:
    skew, width, scale = skew_args(device, torch.float32)
    expected = cayley_neumann(skew, width, scale)
    skew[COLUMNS.skew_per_block + 3] = bad
    result = cayley_neumann(skew, width, scale)
    assert not result[1].any()
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@on_devices
@of_dtypes
@pytest.mark.parametrize("sides", SIDES)
def test_rotate_on_a_device(device: str, dtype: torch.dtype, sides: str) -> None:
    args = rotate_args(device, dtype, sides)
    weight, residual = args[:2]
    exact = [arg.double() if arg is not None and arg.is_floating_point() else arg for arg in args]
    exact[1] = None
    exact = [arg if arg is None else arg.cpu() for arg in exact]
    naive.rotate_(*exact)

    rotate_(*args)

    got = decode(weight, residual).double().cpu()
    stored = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-18, torch.float32: 2.0**-23, torch.float64: 2.0**-52}[dtype]
    summed = 1e-14 if dtype == torch.float64 else 2e-6
    stored *= 2 if sides == "both" and device == "cuda" else 1  # Triton stores after each side
    assert ((got - exact[0]).abs() <= stored * exact[0].abs() + summed * exact[0].abs().max()).all()


@on_devices
@of_dtypes
def test_linear_on_a_device(device: str, dtype: torch.dtype) -> None:
    got = linear_with_gradients(device, dtype)
    args = [
        arg.detach().double() if torch.is_tensor(arg) and arg.is_floating_point() else arg
        for arg in linear_args("cpu", dtype)
    ]
    x, bias, q = args[0].requires_grad_(), args[2].requires_grad_(), args[3].requires_grad_()
    y = rotated_linear(*args)
    cotangent = normal(*y.shape, seed=7, dtype=dtype).double()
    expected = (y.detach(), *torch.autograd.grad(y, (x, bias, q), cotangent))
    rounded, summed = (torch.finfo(of).eps for of in (dtype, got[-1].dtype))
    for value, exact in zip(got, expected):
        assert (value.double().cpu() - exact).norm() <= (rounded + COLUMNS.features**0.5 * summed) * exact.norm()


# --- The user's precision settings -----------------------------------------------------------------------------------


def settings() -> tuple[str, ...]:
    """All that torch can be asked about the precision of float32 products."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "the new interface is in use"
    backends = torch.backends
    return legacy, backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def untouched() -> Iterator[None]:
    before = settings()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert settings() == before


def nothing() -> None:
    pass


def legacy_high() -> None:
    torch.set_float32_matmul_precision("high")


def legacy_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def legacy_flag() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def new_cuda() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def new_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def both_interfaces() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


CHOICES = [nothing, legacy_high, legacy_medium, legacy_flag, new_cuda, new_cpu, new_everywhere, both_interfaces]
choices = pytest.mark.parametrize("choose", CHOICES, ids=lambda choose: choose.__name__)


@choices
@pytest.mark.usefixtures("untouched")
def test_full_precision_restores_the_users_settings(choose: Callable[[], None]) -> None:
    choose()
    before = settings()
    with full_precision(torch.device("cpu")):
        assert settings()[2:] == ("ieee", "ieee")
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert settings() == before


@choices
@pytest.mark.usefixtures("untouched")
def test_full_precision_restores_the_users_settings_after_an_error(choose: Callable[[], None]) -> None:
    choose()
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.usefixtures("untouched")
def test_a_backend_that_follows_the_wider_setting_follows_it_afterwards() -> None:
    new_everywhere()
    with full_precision(torch.device("cpu")):
        pass
    torch.backends.fp32_precision = "ieee"
    assert settings()[2:] == ("ieee", "ieee")


def test_full_precision_suspends_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.float32


@on_devices
@choices
@pytest.mark.usefixtures("untouched")
def test_folding_ignores_the_users_precision(device: str, choose: Callable[[], None]) -> None:
    expected = rotate_args(device, torch.float32)
    rotate_(*expected)
    skew = skew_args(device, torch.float32)
    rotation = cayley_neumann(*skew)
    choose()
    args = rotate_args(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        rotate_(*args)
        assert torch.equal(cayley_neumann(*skew), rotation)
    assert torch.equal(args[0], expected[0])
