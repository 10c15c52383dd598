"""Ranks that train together: as one rank on the same global batch, and bitwise equal among each other."""

from __future__ import annotations

import pytest
import ranks
import torch
from ranks import Result

WORLDS = (2, 1, 4)
"""In their order: all resume from the checkpoint of two."""

SEVERAL = (2, 4)
TRAINED = (
    *("compiled_then_wrapped", "wrapped_then_compiled", "accumulated", "in_pieces", "dense", "static"),
    *("searched", "low_rank", "resumed_from_two", "accelerated", "accelerated_then_compiled"),
)
OTHERS = ("uneven", "uneven_alone", "checked", "watched", "rounded_stochastically", "stored_in_int8")
LOSSY = ("compressed_to_float16", "compressed_to_bfloat16")
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
@pytest.mark.parametrize("scenario", (*TRAINED, *LOSSY, *OTHERS))
def test_ranks_stay_bitwise_equal(results: Results, scenario: str, world: int) -> None:
    first, *others = (result[scenario]["values"] for result in results[world])
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("scenario", "error"), [("compressed_to_float16", 2e-3), ("compressed_to_bfloat16", 1e-2)])
def test_compressed_gradients_train_almost_alike(results: Results, scenario: str, error: float, world: int) -> None:
    alone = results[1][0]["compiled_then_wrapped"]["values"]
    distances = [
        float((ours - expected).norm() / expected.norm())
        for ours, expected in zip(results[world][0][scenario]["values"], alone, strict=True)
    ]
    assert 1e-9 < max(distances) < error


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_ran_out_of_inputs_go_on_with_the_others(results: Results, world: int) -> None:
    first, *others = (result["uneven"] for result in results[world])
    assert all(first["moved"])
    assert first["counts"] == [(1, 7), (1, 7)]
    for other in others:
        assert other["counts"] == first["counts"]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first["joined"], other["joined"], strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_uneven_inputs_train_as_their_shares_of_one_batch(results: Results, world: int) -> None:
    for result in results[world]:
        for ours, expected in zip(result["uneven_alone"]["values"], result["uneven_alone"]["expected"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_a_search_for_unused_parameters_is_refused_on_the_dense_route(results: Results, world: int) -> None:
    for result in results[world]:
        assert "takes 'layers.0.weight' for unused" in result["dense"]["searching"]
        assert "static_graph=True" in result["dense"]["searching"]


def test_only_skew_parameters_and_ordinary_ones_are_reduced(results: Results) -> None:
    skews = 2 * 120 + 120 + 2 * 120 + 120  # blocks of 16: 32 x 22 channels, then 20 x 32
    ordinary = 32 + 20 + 20
    assert results[2][0]["compiled_then_wrapped"]["reduced"] == skews + ordinary


def test_a_graph_is_cut_where_a_bucket_of_what_is_reduced_is_full(results: Results) -> None:
    for result in results[2]:
        assert result["in_pieces"]["pieces"] == [1, 3]
        whole, cut = result["in_pieces"]["early"]
        assert whole == 0
        assert cut >= 2


@pytest.mark.parametrize("world", SEVERAL)
def test_a_rank_that_went_astray_is_named_and_repaired(results: Results, world: int) -> None:
    for result in results[world]:
        checked = result["checked"]
        assert "'layers.2.weight' and 0 more of 2 converted weights differ between ranks" in checked["message"]
        (warning,) = checked["repaired"]
        assert (
            "'layers.2.weight' and 0 more of 2 converted weights differed between ranks; all have those of rank 0" in warning
        )


@pytest.mark.parametrize("world", SEVERAL)
def test_a_watch_compares_ranks_every_few_steps(results: Results, world: int) -> None:
    for result in (rank["watched"] for rank in results[world]):
        assert result["agreed"] == [""] * 3
        assert "'layers.2.weight' and 0 more of 2 converted weights differ between ranks" in result["told"]
        assert result["unseen"] == result["removed"] == ""
        first, second = result["repaired"]
        assert len(first) == 1
        assert second == []


@pytest.mark.parametrize("world", WORLDS)
def test_a_watch_is_refused_by_one_sentence(results: Results, world: int) -> None:
    for result in (rank["watched"] for rank in results[world]):
        assert "every=0 is not a number of steps" in result["refused"]
        assert "AcceleratedOptimizer takes no hooks; give watch_ranks the torch optimizer" in result["wrapper"]


@pytest.mark.parametrize("world", SEVERAL)
def test_accelerate_spreads_over_ranks(results: Results, world: int) -> None:
    for result in results[world]:
        assert result["accelerated"]["kind"] == result["accelerated_then_compiled"]["kind"] == "DistributedType.MULTI_CPU"


@pytest.mark.parametrize("world", WORLDS)
def test_lean_weights_are_compared_by_what_they_keep(results: Results, world: int) -> None:
    for result in results[world]:
        assert result["stored_in_int8"]["agreed"] == ""
        assert ("'layers.2.weight' and 0 more" in result["stored_in_int8"]["message"]) == (world > 1)


@pytest.mark.parametrize("world", WORLDS)
def test_a_wrapper_before_conversion_is_refused_with_the_line_to_add(results: Results, world: int) -> None:
    for result in results[world]:
        unprepared = result["wrapped_unprepared"]
        assert all("Add the line  poetx_compile.prepare(model, batch)  before" in text for text in unprepared["messages"])
        assert not unprepared["converted"]


@pytest.mark.parametrize("world", SEVERAL)
def test_ranks_that_drew_differently_are_refused_when_wrapped(results: Results, world: int) -> None:
    for result in results[world]:
        assert "drew different permutations" in result["prepared_differently"]["message"]
        assert len(result["prepared_differently"]["names"]) == 5


@pytest.mark.parametrize("world", WORLDS)
def test_shards_of_weights_and_of_states_are_refused(results: Results, world: int) -> None:
    for result in (rank["sharded"] for rank in results[world]):
        messages = result["messages"]
        assert "ZeroRedundancyOptimizer cannot train the rotation of 'layers.0.weight'" in messages["states"]
        assert "FullyShardedDataParallel would cut it into shards" in messages["one by one"]
        for name in ("converted", "ordinary"):
            assert "wrapped in FSDPModule, whose shards cannot be rotated: use DistributedDataParallel" in messages[name]
        assert result["unchanged"]
        assert all(result["moved"])
