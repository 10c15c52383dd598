"""Ranks that train together: as one rank on the same global batch, and bitwise equal among each other."""

from __future__ import annotations

import pytest
import ranks
import torch
from ranks import Result

WORLDS = (1, 2, 4)
TRAINED = ("compiled_then_wrapped", "wrapped_then_compiled", "accumulated", "resumed_from_one")
Results = dict[int, list[dict[str, Result]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    return {world: ranks.run_all(folder, world) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", TRAINED)
def test_many_ranks_train_as_one(results: Results, scenario: str, world: int) -> None:
    alone = results[1][0]["compiled_then_wrapped"]["values"]
    for ours, expected in zip(results[world][0][scenario]["values"], alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", (*TRAINED, "compressed", "checked", "rounded_stochastically"))
def test_ranks_stay_bitwise_equal(results: Results, scenario: str, world: int) -> None:
    first, *others = (result[scenario]["values"] for result in results[world])
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert torch.equal(ours, theirs)


def test_only_skew_parameters_and_ordinary_ones_are_reduced(results: Results) -> None:
    skews = 2 * 120 + 120 + 2 * 120 + 120  # blocks of 16: 32 x 22 channels, then 20 x 32
    ordinary = 32 + 20 + 20
    assert results[2][0]["compiled_then_wrapped"]["reduced"] == skews + ordinary


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_rank_that_went_astray_is_named_and_repaired(results: Results, world: int) -> None:
    for result in results[world]:
        assert "'layers.2.weight' and 0 more of 2 converted weights differ between ranks" in result["checked"]["message"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_wrapper_before_conversion_is_refused_with_the_line_to_add(results: Results, world: int) -> None:
    for result in results[world]:
        unprepared = result["wrapped_unprepared"]
        assert all("Add the line  poetx_compile.prepare(model, batch)  before" in text for text in unprepared["messages"])
        assert not unprepared["converted"]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_that_drew_differently_are_refused_when_wrapped(results: Results, world: int) -> None:
    for result in results[world]:
        assert "drew different permutations" in result["prepared_differently"]["message"]
        assert len(result["prepared_differently"]["names"]) == 5
