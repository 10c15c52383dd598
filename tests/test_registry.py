"""How a factor is found again, for as long as its weight lives."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from torch import nn
from turned import CONFIG, small_factor

from poetx_compile.factor import OrthogonalFactor
from poetx_compile.registry import Registry


def registered(registry: Registry) -> tuple[nn.Parameter, OrthogonalFactor]:
    weight = nn.Parameter(torch.ones(16, 16))
    factor = OrthogonalFactor(weight, "fc.weight", CONFIG)
    registry.add(factor)
    return weight, factor


def test_a_factor_is_found_by_its_weight_and_by_its_q() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    assert registry.of_weight(weight) is registry.of_skew(factor.q) is factor
    assert list(registry) == [factor]
    assert registry.of_weight(factor.q) is registry.of_skew(weight) is None
    assert registry.of_weight(copy.deepcopy(weight)) is None
    assert registry.of_weight(None) is registry.of_weight(object()) is None


def test_a_factor_goes_with_its_weight() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    gone = weakref.ref(factor)
    del weight, factor
    gc.collect()
    assert gone() is None
    assert len(registry) == 0
    assert not registry._by_skew


def test_a_factor_outlives_the_swap_of_its_weights_data() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    weight.data = torch.zeros(16, 16)
    assert registry.of_weight(weight) is factor


def test_a_weight_may_be_registered_again() -> None:
    """The first factor's death notice must not take the second one along, nor leave it behind."""
    registry = Registry()
    weight, first = registered(registry)
    registry.remove(first)
    assert registry.of_weight(weight) is registry.of_skew(first.q) is None
    second = OrthogonalFactor(weight, "fc.weight", CONFIG)
    registry.add(second)
    registry.remove(first)
    del first
    gc.collect()
    assert registry.of_weight(weight) is second
    del weight, second
    gc.collect()
    assert len(registry) == 0
    assert not registry._by_skew


def test_the_death_of_a_released_weight_spares_a_factor_whose_q_took_the_place_of_its_own() -> None:
    registry = Registry()
    released, first = registered(registry)
    second = small_factor()
    registry.remove(first)
    place, data = id(first.q), second.q.data
    del first
    same_place = [q for q in [nn.Parameter(data) for _ in range(100)] if id(q) == place]
    assert same_place, "no identity was used again: nothing is tested"
    second.q = same_place[0]
    registry.add(second)
    del released
    gc.collect()
    assert registry.of_skew(second.q) is second


def test_weights_that_come_and_go_leave_nothing() -> None:
    """Identities are used again; a factor of a dead weight must not be taken for that of its successor."""
    registry = Registry()
    for _ in range(50):
        weight, factor = registered(registry)
        assert registry.of_weight(weight) is factor
        assert len(registry) == 1
        del weight, factor
    gc.collect()
    assert len(registry) == 0
