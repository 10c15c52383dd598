"""A step that is not a number rotates nothing, and says so."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import loss, network, rotating, train, values
from torch import optim

from poetx_compile import PoetxWarning

SAID = r"the step of '0\.weight' and 1 more was NaN or infinite; its weight was left as it was.*clip gradients"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_survive_a_step_that_is_not_a_number(bad: float, dtype: torch.dtype) -> None:
    model = network(dtype)
    compiled = rotating(model)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    train(compiled, optimizer, range(2))
    before = values(model)
    loss(compiled, 2, dtype).backward()
    for weight in (model[0].weight, model[2].weight):
        weight.grad.fill_(bad)
    with pytest.warns(PoetxWarning, match=SAID):
        optimizer.step()
    torch.testing.assert_close(values(model)[::2][:2], before[::2][:2], rtol=0, atol=0)
    optimizer.zero_grad()
    train(compiled, optimizer, [3])
    assert not torch.equal(model[0].weight, before[0]), "plain SGD remembers nothing of it"


def test_only_blocks_with_such_numbers_stay() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    loss(rotating(model), 0).backward()
    before = values(model)[0]
    model[0].weight.grad[0] = math.nan
    with pytest.warns(PoetxWarning, match=r"'0\.weight' was NaN"):
        optimizer.step()
    assert model[0].weight.isfinite().all()
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(torch.linalg.svdvals(model[0].weight), torch.linalg.svdvals(before), rtol=1e-12, atol=0)


def test_moments_that_are_not_numbers_keep_the_weight_for_good_and_are_told_once() -> None:
    model = network()
    compiled = rotating(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    loss(compiled, 0).backward()
    before = values(model)[0]
    model[0].weight.grad.fill_(math.nan)
    with pytest.warns(PoetxWarning) as said:
        optimizer.step()
        optimizer.zero_grad()
        train(compiled, optimizer, range(1, 4))
    assert len(said) == 1
    assert torch.equal(model[0].weight, before)


def test_each_model_is_told() -> None:
    for _ in range(2):
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        loss(rotating(model), 0).backward()
        model[0].weight.grad.fill_(math.nan)
        with pytest.warns(PoetxWarning, match=r"'0\.weight' was NaN"):
            optimizer.step()
