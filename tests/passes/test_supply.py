"""Effective weights in the place of parameters that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, factor_of
from strategies import normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poetx_compile import PoetxConfig, conversion, stand_in
from poetx_compile.passes import supply
from poetx_compile.retraction import retract_all

CONFIG = PoetxConfig(**OPTIONS | {"storage": "int8"})
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda w, x: F.linear(x, w),
    "twice": lambda w, x: F.linear(torch.tanh(F.linear(x, w)), w.t()),
    "scaled": lambda w, x: F.linear(x, w * 2),
    "sliced": lambda w, x: x @ w[:7].t(),
    "stacked": lambda w, x: torch.einsum("bi,oi->bo", x, torch.cat([w, w])),
    "penalty": lambda w, x: F.linear(x, w) + w.square().sum(),
    "checkpointed": lambda w, x: checkpoint(lambda y: F.linear(y, w * 2), x, use_reentrant=False),
    "inside and outside": lambda w, x: checkpoint(lambda y: F.linear(y, w), x, use_reentrant=False) + w.sum(1),
    "nested": lambda w, x: checkpoint(
        lambda y: checkpoint(lambda z: F.linear(z, w).sin(), y, use_reentrant=False) * w.mean(), x, use_reentrant=False
    ),
    "vmap": lambda w, x: torch.func.vmap(lambda row: (w * row).sum(1))(x),
}


class Uses(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(32, 22, seed=0))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.weight, x)


def packed(use: Callable[[Any, Tensor], Tensor]) -> Uses:
    """In float64, with a rotation behind it."""
    model = Uses(use)
    factor = conversion.adopt(model.weight, "weight", CONFIG, storage="int8")
    factor.is_covered = True
    stand_in.pack([factor])
    with torch.no_grad():
        factor.q.copy_(normal(factor.q.numel(), seed=1) * 0.1)
    retract_all([(factor, 1.0)])
    return model


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("mode", ["training", "no_grad", "frozen"])
def test_a_compiled_use_is_that_of_the_effective_weight(use: Callable[[Any, Tensor], Tensor], mode: str) -> None:
    model = packed(use)
    factor = factor_of(model.weight)
    ordinary = Uses(use)
    ordinary.weight.data = stand_in.values(model.weight)
    x = normal(5, 22, seed=2).requires_grad_()
    model.weight.requires_grad_(mode != "frozen")
    run = torch.compile(model, backend="poetx", options=OPTIONS | {"storage": "int8"})
    with torch.set_grad_enabled(mode != "no_grad"):
        got, wanted = run(x), ordinary(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    if mode == "no_grad":
        assert not got.requires_grad
        return
    wanted.square().sum().backward()
    wanted_x, x.grad = x.grad, None
    got.square().sum().backward()
    torch.testing.assert_close(x.grad, wanted_x, rtol=1e-10, atol=1e-10)
    if mode == "training":
        torch.testing.assert_close(model.weight.grad, factor.project(ordinary.weight.grad), rtol=1e-9, atol=1e-9)
    else:
        assert model.weight.grad is None


def test_a_placeholder_that_nothing_reads_goes_without_a_trace() -> None:
    from poetx_compile.passes.rewrite import Added

    model = packed(USES["linear"])
    graph = torch.fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    graph.output(x)
    gm = torch.fx.GraphModule({}, graph)
    added = Added(gm)
    supply(gm, [(weight, factor_of(model.weight))], added)
    assert [node.name for node in gm.graph.nodes] == ["x", "output"]
    assert added.tensors == []
