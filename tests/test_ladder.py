"""The ladder of ``memory=``: what is tried in which order, and that the first which fits is taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from poetx_compile import PoetxConfig, PoetxError
from poetx_compile.base import BASES
from poetx_compile.config import split_options
from poetx_compile.estimate import Traced, estimate, trace
from poetx_compile.ladder import BUDGETS, MARGIN, STORED, choose, rungs

OPTIONS = {"block_size": 64}
SIZES = (1024,) * 7


def build() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(m, n, bias=False, dtype=torch.bfloat16), nn.SiLU()) for m, n in pairwise(SIZES)]
    return nn.Sequential(*layers)


def loss(model: Any, rows: int) -> Tensor:
    return model(torch.zeros(rows, SIZES[0], dtype=torch.bfloat16)).float().square().mean()


def traced(config: PoetxConfig, rows: int = 1024) -> Traced:
    return trace(build, lambda model: loss(model, rows), config)


@pytest.fixture(scope="module")
def by_share() -> dict[float, Traced]:
    return {share: traced(PoetxConfig(**OPTIONS, activation_memory_budget=share)) for share in BUDGETS}


def taken(config: PoetxConfig, limit: float, by_share: dict[float, Traced]) -> PoetxConfig:
    return choose(config, limit, lambda rung: by_share[rung.activation_memory_budget], movable=config.movable)


def moves(config: PoetxConfig) -> tuple[str, str, float]:
    return config.storage, config.skew_dtype, config.activation_memory_budget


def test_the_order_is_every_way_to_store_with_every_share_of_activations() -> None:
    tried = [moves(rung) for rung in rungs(PoetxConfig(), PoetxConfig().movable)]
    assert tried == [(stored["storage"], stored["skew_dtype"], share) for stored in STORED for share in BUDGETS]
    assert tried[0] == moves(PoetxConfig())
    assert tried[-1] == ("int8", "bfloat16", 0.5)


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({"storage": "folded"}, {"storage": {"folded"}}),
        ({"skew_dtype": "float32"}, {"skew_dtype": {"float32"}}),
        ({"activation_memory_budget": 1.0}, {"activation_memory_budget": {1.0}}),
        ({"activation_memory_budget": 0.3, "storage": "int8"}, {"activation_memory_budget": {0.3}, "storage": {"int8"}}),
        ({"route": "dense"}, {"storage": {"folded"}}),
        ({"residual_bits": 4}, {"storage": {"folded"}}),
    ],
)
def test_what_was_named_is_left_alone_even_at_its_default(options: dict[str, Any], fixed: dict[str, set[Any]]) -> None:
    config = split_options(options | {"memory": "auto"}, None)[0]
    tried = list(rungs(config, config.movable))
    assert {name: {getattr(rung, name) for rung in tried} for name in fixed} == fixed
    assert len({moves(rung) for rung in tried}) == len(tried) > 1


def test_a_config_keeps_what_is_not_at_its_default() -> None:
    assert PoetxConfig(storage="int8", memory=1.0).movable == {"skew_dtype", "activation_memory_budget"}
    assert PoetxConfig(memory=1.0).movable == {"storage", "skew_dtype", "activation_memory_budget"}


@given(share=st.floats(0.3, 1.2))
def test_the_first_that_fits_is_taken(by_share: dict[float, Traced], share: float) -> None:
    config = PoetxConfig(**OPTIONS, memory=1.0)
    estimates = {
        rung: estimate(by_share[rung.activation_memory_budget].stored_as(rung)).total
        for rung in rungs(config, config.movable)
    }
    limit = share * next(iter(estimates.values())) / (1 - MARGIN)
    fits = [rung for rung, total in estimates.items() if total <= limit * (1 - MARGIN)]
    if not fits:
        with pytest.raises(PoetxError, match=f"leanest, .*estimated peak {min(estimates.values()) / 1e9:.3g} of "):
            taken(config, limit, by_share)
        return
    chosen = taken(config, limit, by_share)
    assert moves(chosen) == moves(fits[0])
    assert chosen.estimate.total == estimates[fits[0]]


def test_less_memory_takes_later_rungs_down_to_the_last(by_share: dict[float, Traced]) -> None:
    config = PoetxConfig(**OPTIONS, memory=1.0)
    order = [moves(rung) for rung in rungs(config, config.movable)]
    places, limit = [], 1e9
    while True:
        try:
            chosen = taken(config, limit, by_share)
        except PoetxError:
            break
        places.append(order.index(moves(chosen)))
        limit = chosen.estimate.total / (1 - MARGIN) - 1
    assert places == sorted(set(places))
    reached = [order[place] for place in places]  # which shares help depends on torch's partitioner
    assert reached[0] == ("folded", "float32", 1.0)
    assert ("int8", "float32", 1.0) in reached
    assert reached[-1][:2] == ("int8", "bfloat16")


def test_what_cannot_fit_is_not_traced() -> None:
    """Where weights and states alone are too large, activations are not looked at."""
    asked = []

    def again(rung: PoetxConfig) -> Traced:
        asked.append(rung.activation_memory_budget)
        return traced(rung, rows=8)

    config = PoetxConfig(**OPTIONS, memory=1.0)
    first = estimate(traced(replace(config, memory=0.0), rows=8))
    with pytest.raises(PoetxError, match="Take a shorter sequence, a smaller batch or activation checkpointing"):
        choose(config, first.weights / 10, again)
    assert asked == list(BUDGETS), "once for what there is to store, once for the leanest of all"


@pytest.mark.parametrize("storage", BASES)
@pytest.mark.parametrize("rows", [64, 1024])
def test_other_storage_on_the_same_graphs_is_nearly_what_its_own_graphs_say(storage: str, rows: int) -> None:
    config = PoetxConfig(**OPTIONS, storage=storage)
    own = estimate(traced(config, rows))
    reused = estimate(traced(PoetxConfig(**OPTIONS), rows).stored_as(config))
    kept = ("weights", "residuals", "q", "states", "saved", "converted")
    assert [getattr(reused, name) for name in kept] == [getattr(own, name) for name in kept]
    assert own.total <= reused.total * 1.01, "within the margin, and rather too much"
    assert reused.total <= own.total * 1.05


def test_bfloat16_skews_on_the_same_graphs_are_counted_as_they_are() -> None:
    config = PoetxConfig(**OPTIONS, skew_dtype="bfloat16")
    own, reused = estimate(traced(config)), estimate(traced(PoetxConfig(**OPTIONS)).stored_as(config))
    assert (reused.q, reused.states, reused.weights) == (own.q, own.states, own.weights)
    assert own.total <= reused.total <= own.total * 1.02
