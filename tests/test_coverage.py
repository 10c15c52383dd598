"""A rotation that no optimizer will ever make is announced: nothing fails to train in silence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import loss, network, rotating, train
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_

from poetx_compile import PoetxWarning, restore

NOT_HELD = r"no torch\.optim\.Optimizer holds it.*exclude"


def step_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.grad.shape == parameter.shape:
                parameter -= 0.1 * parameter.grad


def test_an_optimizer_that_holds_everything_hears_nothing() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(2))


def test_a_weight_that_was_left_out() -> None:
    model = network()
    optimizer = optim.AdamW([*model[0].parameters(), *model[3].parameters()], lr=0.01)
    with pytest.warns(PoetxWarning, match=r"'2\.weight' has a gradient, but " + NOT_HELD):
        train(rotating(model), optimizer, range(1))


def test_a_loop_without_optimizer() -> None:
    model = network()
    loss(rotating(model), 0).backward()
    with pytest.warns(PoetxWarning, match=r"'0\.weight' and 1 more has a gradient, but " + NOT_HELD):
        step_by_hand(model)


def test_it_is_said_once() -> None:
    model = network()
    compiled = rotating(model)
    loss(compiled, 0).backward()
    with pytest.warns(PoetxWarning) as said:
        for step in range(3):
            step_by_hand(model)
            loss(compiled, step).backward()
            clip_grad_norm_(model.parameters(), 1.0)
    assert len(said) == 1


def test_an_optimizer_that_comes_in_time() -> None:
    model = network()
    compiled = rotating(model)
    loss(compiled, 0).backward()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_frozen_and_ordinary_parameters_need_none() -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    train(rotating(model), optim.AdamW(model[0].parameters(), lr=0.01), range(2))


# --- Nothing is rotated ----------------------------------------------------------------------------------------------

NOTHING = r"AdamW trains a compiled model of which no weight is rotated: '0\.weight' is ordinary \(shorter than a chunk"


def short() -> nn.Sequential:
    """Like :func:`network`, of layers that are shorter than a chunk of 64."""
    return nn.Sequential(nn.Linear(22, 28), nn.Tanh(), nn.Linear(28, 20)).double()


def compiled(model: nn.Module) -> Any:
    return rotating(model, block_size=64, chunk=64)


def test_a_model_of_which_nothing_is_rotated_is_announced_once() -> None:
    model = short()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    with pytest.warns(PoetxWarning, match=NOTHING + r".*, and 1 more stay so too\. poetx_compile\.report") as said:
        train(compiled(model), optimizer, range(3))
        torch._dynamo.reset()
        train(compiled(model), optimizer, range(3))
    assert len(said) == 1


def test_it_is_said_of_each_optimizer() -> None:
    for _ in range(2):
        torch._dynamo.reset()
        model = short()
        with pytest.warns(PoetxWarning, match=NOTHING):
            train(compiled(model), optim.AdamW(model.parameters(), lr=0.01), range(1))


def test_beside_rotations_of_another_model() -> None:
    model, other = short(), network()
    train(rotating(other), optim.AdamW(other.parameters(), lr=0.01), range(1))
    with pytest.warns(PoetxWarning, match=NOTHING):
        train(compiled(model), optim.AdamW(model.parameters(), lr=0.01), range(1))


def test_what_was_asked_for_is_no_surprise() -> None:
    model = network()
    train(rotating(model, exclude=["*"]), optim.AdamW(model.parameters(), lr=0.01), range(2))


def test_an_optimizer_of_ordinary_parameters_beside_one_of_rotations() -> None:
    model = nn.Sequential(*network(), nn.Linear(20, 3).double(), nn.Linear(3, 20).double())
    rotations = optim.AdamW(model[:4].parameters(), lr=0.01)
    rest = optim.AdamW(model[4:].parameters(), lr=0.01)
    run = rotating(model)
    for step in range(2):
        loss(run, step).backward()
        rest.step()
        rotations.step()


def test_a_model_that_was_restored_hears_nothing() -> None:
    model = short()
    loss(compiled(model), 0).backward()
    restore(model)
    optim.AdamW(model.parameters(), lr=0.01).step()


def test_inference_and_other_models_hear_nothing() -> None:
    model, other = short(), network()
    with torch.no_grad():
        compiled(model)(torch.ones(2, 22, dtype=torch.float64))
    loss(model, 0).backward()
    optim.AdamW(model.parameters(), lr=0.01).step()
    torch._dynamo.reset()
    compiled(model)(torch.ones(2, 22, dtype=torch.float64))
    loss(other, 0).backward()
    optim.AdamW(other.parameters(), lr=0.01).step()
