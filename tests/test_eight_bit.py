"""Optimizers that keep their states in eight bits, from their own packages."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import factor_of
from optimizers import EIGHT_BIT
from torch import Tensor, nn

OPTIONS = {"block_size": 64, "inner": "aot_eager"}
START = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 128), nn.LayerNorm(128))
"""Wide enough that moments of ``q`` and of ordinary parameters are quantised."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 256, generator=generator)
    return x, x[:, :128].roll(3, 1)


@pytest.mark.parametrize("skew_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("package", "kind"), EIGHT_BIT)
def test_moments_of_rotations_are_quantised_and_resume_exactly(package: str, kind: str, skew_dtype: str) -> None:
    options = OPTIONS | {"skew_dtype": skew_dtype}
    dtype = torch.float32 if skew_dtype == "float32" else torch.bfloat16
    optim = pytest.importorskip(f"{package}.optim")

    def fresh() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        torch._dynamo.reset()
        model = copy.deepcopy(START).to(dtype)
        optimizer = getattr(optim, kind)(model.parameters(), lr=1e-3 if kind == "Lion8bit" else 3e-3)
        return model, torch.compile(model, backend="poetx", options=options), optimizer

    def train(compiled: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            x, target = (tensor.to(dtype) for tensor in batch(step))
            loss = F.mse_loss(compiled(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, compiled, optimizer = fresh()
    losses = train(compiled, optimizer, range(12))
    assert losses[-1] < 0.9 * losses[0]
    state = optimizer.state[model[0].weight][EIGHT_BIT[package, kind]]
    assert state.numel() == factor_of(model[0].weight).q.numel()
    assert "OptimState" in type(state).__name__ or state.dtype == torch.uint8

    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    train(compiled, optimizer, range(12, 15))
    again, compiled_again, optimizer_again = fresh()
    saved.seek(0)
    weights, states = torch.load(saved, weights_only=True)
    again.load_state_dict(weights)
    optimizer_again.load_state_dict(states)
    train(compiled_again, optimizer_again, range(12, 15))
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
