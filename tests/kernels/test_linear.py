"""``rotated_linear``: the user's own product, whose backward finds the gradient of the rotation without that of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import explicit_weight
from strategies import SEEDS, OwningFactor, factors, normal
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import HALF, LINEAR_VERSION, rotated_linear


@dataclass
class Layer:
    """A linear layer and its data: ``[m, n]`` is ``[outputs, inputs]``, or ``[inputs, outputs]`` where transposed."""

    factor: OrthogonalFactor
    transposed: bool
    x: Tensor
    bias: Tensor | None
    cotangent: Tensor

    @classmethod
    def of(
        cls,
        factor: OrthogonalFactor,
        leading: tuple[int, ...],
        *,
        transposed: bool = False,
        with_bias: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Layer:
        m, n = factor.weight.shape
        inputs, outputs = (m, n) if transposed else (n, m)
        return cls(
            factor,
            transposed,
            normal(*leading, inputs, seed=seed, dtype=dtype).requires_grad_(),
            normal(outputs, seed=seed + 1, dtype=dtype).requires_grad_() if with_bias else None,
            normal(*leading, outputs, seed=seed + 2, dtype=dtype),
        )

    def rotated(self, q: Tensor) -> Tensor:
        f = self.factor
        return rotated_linear(
            self.x,
            f.weight,
            self.bias,
            q,
            f.row_channels,
            f.column_channels,
            f.rows.width,
            f.columns.width,
            f.config.scale,
            self.transposed,
            LINEAR_VERSION,
        )

    def plain(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return F.linear(self.x, weight, self.bias)
        return self.x @ weight if self.bias is None else torch.addmm(self.bias, self.x, weight)

    def gradients(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Of input, bias if there is one, and ``parameters``."""
        wanted = [self.x] + ([] if self.bias is None else [self.bias]) + list(parameters)
        return torch.autograd.grad(y, wanted, self.cotangent.to(y.dtype))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """All conventions; inputs of 1, 2 and 3 dimensions, and empty batches."""
    transposed, with_bias = draw(st.booleans()), draw(st.booleans())
    sizes = st.lists(st.integers(0, 5), max_size=2)
    leading = [draw(st.integers(0, 9))] if transposed and with_bias else draw(sizes)
    return Layer.of(draw(factors()), tuple(leading), transposed=transposed, with_bias=with_bias, seed=draw(SEEDS))


@given(layers())
def test_the_output_is_that_of_the_plain_layer(layer: Layer) -> None:
    assert torch.equal(layer.rotated(layer.factor.q), layer.plain(layer.factor.weight))


@given(layers())
def test_gradients_of_input_and_bias_are_those_of_the_plain_layer(layer: Layer) -> None:
    rotated, plain = layer.gradients(layer.rotated(layer.factor.q)), layer.gradients(layer.plain(layer.factor.weight))
    torch.testing.assert_close(rotated, plain, rtol=1e-12, atol=1e-12)


@given(layers())
def test_the_gradient_of_q_is_that_of_the_explicit_rotation(layer: Layer) -> None:
    weight, q = layer.factor.weight.detach(), layer.factor.q
    *_, dq = layer.gradients(layer.rotated(q), q)
    loss = torch.func.grad(lambda q: (layer.cotangent * layer.plain(explicit_weight(layer.factor, weight, q))).sum())
    torch.testing.assert_close(dq, loss(torch.zeros_like(dq)), rtol=1e-10, atol=1e-10)


@given(layers())
def test_both_routes_agree(layer: Layer) -> None:
    q, weight = layer.factor.q, layer.factor.weight
    *_, gram = layer.gradients(layer.rotated(q), q)
    *_, dw = layer.gradients(layer.plain(weight), weight)
    torch.testing.assert_close(gram, layer.factor.project(dw), rtol=1e-10, atol=1e-10)


@given(layers())
def test_the_weight_gets_no_gradient(layer: Layer) -> None:
    y = layer.rotated(layer.factor.q)
    assert torch.autograd.grad(y, layer.factor.weight, layer.cotangent, allow_unused=True) == (None,)


@given(layers())
def test_an_input_that_needs_no_gradient_changes_nothing_for_q(layer: Layer) -> None:
    *_, expected = layer.gradients(layer.rotated(layer.factor.q), layer.factor.q)
    layer.x = layer.x.detach()
    (dq,) = torch.autograd.grad(layer.rotated(layer.factor.q), layer.factor.q, layer.cotangent)
    assert torch.equal(dq, expected)


def small_factor(*shape: int, dtype: torch.dtype = torch.float64) -> OwningFactor:
    return OwningFactor(nn.Parameter(normal(*shape, seed=5, dtype=dtype)), "weight", PoetxConfig(block_size=4, chunk=2))


@pytest.mark.parametrize("shape", [(12, 1), (1, 12)], ids=["rows only", "columns only"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_short_side_is_left_alone(shape: tuple[int, int], transposed: bool) -> None:
    layer = Layer.of(small_factor(*shape), (7,), transposed=transposed)
    q = layer.factor.q
    assert q.numel() == 3 * 6
    *_, dq = layer.gradients(layer.rotated(q), q)
    *_, dw = layer.gradients(layer.plain(layer.factor.weight), layer.factor.weight)
    torch.testing.assert_close(dq, layer.factor.project(dw), rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_refused() -> None:
    layer = Layer.of(small_factor(8, 8), (3,))
    loss = layer.rotated(layer.factor.q).square().sum()
    (dq,) = torch.autograd.grad(loss, layer.factor.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


# --- Lower precision -------------------------------------------------------------------------------------------------


def as_float64(layer: Layer) -> Layer:
    """The same layer with the same numbers, in float64."""
    f = layer.factor
    wide = OwningFactor(nn.Parameter(f.weight.detach().double()), f.name, f.config)
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    return Layer(wide, layer.transposed, layer.x.detach().double().requires_grad_(), bias, layer.cotangent.double())


def packed(terms: tuple[Tensor, Tensor], channels: Tensor, width: int) -> Tensor:
    """``Σ|a||b|`` and its transpose inside each block, packed: what rounding errors of a Gram matrix are relative to."""
    left, right = (term.double().abs().reshape(-1, term.shape[-1])[:, channels].unflatten(1, (-1, width)) for term in terms)
    sizes = torch.einsum("tri,trj->rij", left, right)
    rows, columns = torch.triu_indices(width, width, 1)
    return (sizes + sizes.mT)[:, rows, columns].reshape(-1)


@given(
    st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    SEEDS,
)
def test_lower_precision_errs_by_the_rounding_of_activations(
    dtype: torch.dtype, transposed: bool, with_bias: bool, tokens: int, seed: int
) -> None:
    """Outputs and input gradients are rounded to the weight's dtype before they meet in a sum, which is float32."""
    factor = small_factor(10, 12, dtype=dtype)
    layer = Layer.of(factor, (tokens,), transposed=transposed, with_bias=with_bias, seed=seed, dtype=dtype)
    y = layer.rotated(factor.q)
    dx, *_, dq = layer.gradients(y, factor.q)
    exact = as_float64(layer)
    exact_y = exact.rotated(exact.factor.q)
    exact_dx, *_, exact_dq = exact.gradients(exact_y, exact.factor.q)

    assert dq.dtype == torch.float32
    outer, inner = (layer.cotangent, exact_y), (exact_dx, layer.x.detach())
    of_rows, of_columns = (inner, outer) if transposed else (outer, inner)
    terms = torch.cat(
        [
            packed(of_rows, factor.row_channels, factor.rows.width),
            packed(of_columns, factor.column_channels, factor.columns.width),
        ]
    )
    sum_of_products = torch.finfo(torch.float32).eps / 2 * (tokens + 12 + 4)
    lengths = max(float(values.detach().norm()) for values in (exact_y, exact_dx, layer.x, layer.cotangent))
    bound = 2 * (torch.finfo(dtype).eps / 2 * terms + 4 * sum_of_products * lengths**2)
    assert ((dq.double() - exact_dq).abs() <= bound).all()
    unit = torch.finfo(dtype).eps / 2
    assert ((dx.double() - exact_dx).abs() <= unit * exact_dx.abs() + sum_of_products * lengths**2).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_bias_alone_turns_nothing(dtype: torch.dtype) -> None:
    """The output is the bias, whose part in the Gram sums must go again without a rounding to half precision."""
    factor = small_factor(10, 12, dtype=dtype)
    layer = Layer.of(factor, (40,), dtype=dtype)
    layer.x = torch.zeros_like(layer.x).requires_grad_()
    *_, dq = layer.gradients(layer.rotated(factor.q), factor.q)
    assert dq.abs().max() <= 40 * torch.finfo(torch.float32).eps * 10 * layer.cotangent.float().norm()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2], ids=str)
def test_under_autocast_dtypes_and_gradients_are_those_of_a_plain_layer(
    dtypes: tuple[torch.dtype, torch.dtype], amp: torch.dtype, with_bias: bool
) -> None:
    of_input, of_weight = dtypes
    layer = Layer.of(small_factor(8, 12, dtype=of_weight), (3, 5), with_bias=with_bias, dtype=of_weight)
    layer.x = layer.x.detach().to(of_input).requires_grad_()
    with torch.autocast("cpu", dtype=amp):
        rotated, plain = layer.rotated(layer.factor.q), layer.plain(layer.factor.weight)
    assert rotated.dtype == plain.dtype == (torch.float64 if of_weight == torch.float64 else amp)
    assert torch.equal(rotated, plain)
    for got, expected in zip(layer.gradients(rotated), layer.gradients(plain)):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_under_autocast_the_gradient_of_q_stays_float32() -> None:
    layer = Layer.of(small_factor(8, 12, dtype=torch.float32), (64,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer.rotated(layer.factor.q)
    *_, dq = layer.gradients(y, layer.factor.q)
    exact = as_float64(layer)
    *_, exact_dq = exact.gradients(exact.rotated(exact.factor.q), exact.factor.q)
    assert dq.dtype == torch.float32
    assert (dq.double() - exact_dq).norm() <= 2.0**-7 * exact_dq.norm()
