"""The cheaper way to each gradient."""

from __future__ import annotations

import pytest
import torch
from graphs import capture
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from poetx_compile import PoetxConfig
from poetx_compile.passes import choose_route


def route(layer: nn.Module, x: torch.Tensor, config: PoetxConfig, dynamic: bool | None = None) -> str:
    matches, _ = capture(layer, x, dynamic=dynamic).normalized().matched(config)
    return choose_route(matches["weight"], config)


def test_small_blocks_make_gram_matrices_cheap() -> None:
    assert route(nn.Linear(64, 96), torch.randn(1000, 64), PoetxConfig(block_size=16)) == "gram"


def test_blocks_as_wide_as_the_layer_and_many_tokens_make_them_dear() -> None:
    layer, config = nn.Linear(64, 64), PoetxConfig(block_size=64)
    assert route(layer, torch.randn(100, 64), config) == "gram"
    assert route(layer, torch.randn(200, 64), config) == "dense"


def test_all_batch_dimensions_count_as_tokens() -> None:
    layer, config = nn.Linear(64, 64), PoetxConfig(block_size=64)
    assert route(layer, torch.randn(2, 100, 64), config) == "dense"


def test_all_uses_of_a_weight_count() -> None:
    """Each use costs Gram matrices of its own, but gradients of the weight are projected once."""

    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    config = PoetxConfig(block_size=64)
    assert route(nn.Linear(64, 64), torch.randn(100, 64), config) == "gram"
    assert route(Twice(64, 64), torch.randn(100, 64), config) == "dense"


@pytest.mark.parametrize("tokens", [100, 200])
def test_symbolic_batch_sizes_count_by_their_hint(tokens: int) -> None:
    config = PoetxConfig(block_size=64)
    x = torch.randn(tokens, 64)
    assert route(nn.Linear(64, 64), x, config, dynamic=True) == route(nn.Linear(64, 64), x, config)


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("wanted", ["gram", "dense"])
def test_the_setting_decides_where_both_may_serve(wanted: str, tokens: int) -> None:
    config = PoetxConfig(block_size=64, route=wanted)
    assert route(nn.Linear(64, 64), torch.randn(tokens, 64), config) == wanted


def test_only_the_dense_route_serves_every_use() -> None:
    class Sliced(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight[:32].t()

    assert route(Sliced(64, 64), torch.randn(5, 64), PoetxConfig(block_size=16, route="gram")) == "dense"


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), width=st.sampled_from([16, 32, 48]), tokens=st.integers(1, 300))
def test_the_fewer_multiplications(rows: int, columns: int, width: int, tokens: int) -> None:
    """``rows`` × ``columns`` blocks; each Gram matrix of a block multiplies ``width²`` times for each row it sums over."""
    torch._dynamo.reset()
    m, n = rows * width, columns * width
    gram = (rows + columns) * width**2 * tokens
    dense = m * n * tokens + rows * width**2 * n + columns * width**2 * m
    layer, x = nn.Linear(n, m), torch.randn(tokens, n)
    assert route(layer, x, PoetxConfig(block_size=width, chunk=16)) == ("gram" if gram <= dense else "dense")
