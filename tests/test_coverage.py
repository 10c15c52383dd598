"""A rotation that no optimizer will ever make is announced: nothing fails to train in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import loss, network, rotating, train
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_

from poetx_compile import PoetxWarning

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
