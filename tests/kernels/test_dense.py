"""The dense route's projection, against the products that define it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import explicit_weight
from strategies import SEEDS, factors, normal
from torch import Tensor

from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import HALF, dense, project
from poetx_compile.layout import StackLayout


def sides(stack: StackLayout, device: str = "cpu") -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int]]:
    """What ``project`` takes of a stack beside its gradient and its weight."""
    rows, columns = stack.rows, stack.columns
    drawn = (side.channels(1, place, 0).to(device) for place, side in enumerate((rows, columns)))
    return *drawn, (rows.width, columns.width), (rows.run, columns.run)


def packed(product: Tensor, channels: Tensor, width: int) -> list[Tensor]:
    """``A − Aᵀ`` above its diagonal, of the blocks of a product of all channels."""
    blocks = [product[block][:, block] for block in channels.split(width)] if width else []
    above = torch.triu_indices(width, width, 1)
    return [(block - block.T)[above[0], above[1]] for block in blocks]


def defined(gradient: Tensor, weight: Tensor, stack: StackLayout) -> Tensor:
    """By whole products in float64, matrix by matrix."""
    row_channels, column_channels, widths, _ = sides(stack)
    parts = []
    for d, w in zip(gradient.double().cpu(), weight.double().cpu()):
        parts += packed(d @ w.T, row_channels, widths[0]) + packed(w.T @ d, column_channels, widths[1])
    return torch.cat(parts)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(4, 40), SEEDS)
def test_every_matrix_of_a_stack_is_projected_alone(count: int, m: int, n: int, seed: int) -> None:
    stack = StackLayout.of((count, m, n), 8, 2)
    gradient, weight = (normal(count, m, n, seed=seed + place) for place in range(2))
    result = project(gradient, weight, *sides(stack), 0.5)
    torch.testing.assert_close(result, 0.5 * defined(gradient, weight, stack), rtol=1e-10, atol=1e-10)


@given(factors(), SEEDS)
def test_it_is_the_gradient_through_the_explicit_weight(factor: OrthogonalFactor, seed: int) -> None:
    weight = factor.weight.detach()
    gradient = normal(*weight.shape, seed=seed)
    widths = factor.rows.width, factor.columns.width
    result = project(gradient[None], weight[None], factor.row_channels, factor.column_channels, widths)
    by_autograd = torch.func.grad(lambda q: (gradient * explicit_weight(factor, weight, q)).sum())(torch.zeros_like(result))
    torch.testing.assert_close(result * (2 * factor.config.scale), by_autograd, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    stack = StackLayout.of((2, 24, 24), 8, 4)
    weight, gradient = (normal(2, 24, 24, seed=seed, dtype=dtype) for seed in range(2))
    result = project(gradient, weight, *sides(stack))
    exact = defined(gradient, weight, stack)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=24 * 2.0**-22 * float(exact.abs().max()))


def test_a_gradient_keeps_digits_that_its_weight_has_not() -> None:
    stack = StackLayout.of((1, 24, 16), 8, 4)
    weight, gradient = normal(1, 24, 16, seed=0, dtype=torch.bfloat16), normal(1, 24, 16, seed=1, dtype=torch.float32)
    result = project(gradient, weight, *sides(stack))
    torch.testing.assert_close(result.double(), defined(gradient, weight, stack), rtol=0, atol=1e-4)
    assert not torch.allclose(result.double(), defined(gradient.bfloat16(), weight, stack), rtol=0, atol=1e-4)


def test_a_large_stack_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = StackLayout.of((5, 16, 24), 8, 4)
    gradient, weight = (normal(5, 16, 24, seed=seed) for seed in range(2))
    whole = project(gradient, weight, *sides(stack))
    calls = []
    monkeypatch.setattr(dense, "_NUMBERS_AT_ONCE", 2 * 16 * 24)
    monkeypatch.setattr(dense, "block_gram", lambda left, *others: calls.append(left) or gram(left, *others))
    torch.testing.assert_close(project(gradient, weight, *sides(stack)), whole, rtol=1e-12, atol=1e-12)
    assert [left[0].shape for left in calls] == [(24, 32), (24, 32), (24, 16)]


gram = dense.block_gram


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("shape", ((1, 320, 448), (1, 448, 100), (6, 256, 192)), ids=str)
def test_on_a_gpu_as_defined(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    stack = StackLayout.of(shape, 64, 32)
    gradient, weight = (normal(*shape, seed=seed, dtype=dtype, device="cuda") for seed in range(2))
    for d, w in ((gradient, weight), (gradient.mT.contiguous().mT, weight.mT.contiguous().mT)):
        result = project(d, w, *sides(stack, "cuda"), 2.0)
        exact = 2.0 * defined(gradient, weight, stack)
        assert result.dtype == torch.float32
        assert (result.double().cpu() - exact).norm() < 1e-5 * exact.norm()
