"""How a dimension is cut into blocks, and how channels are drawn for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import SEEDS

from poetx_compile.layout import BlockLayout, StackLayout, automatic_chunk, permutation_key

CHUNKS = st.integers(1, 16)
BLOCKS_IN_CHUNKS = st.integers(1, 16)
EPOCHS = st.integers(0, 1000)


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    """Of any dimension, rotated or not."""
    chunk = draw(CHUNKS)
    block_size = chunk * draw(BLOCKS_IN_CHUNKS)
    assume(block_size > 1)
    return BlockLayout.of(draw(st.integers(1, 600)), block_size, chunk)


@pytest.mark.parametrize(
    ("features", "count", "width"),
    [(256, 1, 256), (4096, 16, 256), (384, 2, 192), (896, 4, 224), (100, 1, 96), (16, 1, 16), (15, 0, 0)],
)
def test_blocks_of_common_dimensions(features: int, count: int, width: int) -> None:
    layout = BlockLayout.of(features, block_size=256, chunk=16)
    assert (layout.count, layout.width) == (count, width)


@pytest.mark.parametrize(
    ("features", "block_size", "chunk"),
    [
        *((4096, 256, 64), (1024, 512, 64), (14336, 256, 64), (11008, 256, 64)),
        *((1600, 256, 32), (896, 256, 32), (768, 256, 32), (4096, 128, 32), (4100, 256, 32)),
        *((48, 48, 16), (40, 40, 8), (16, 16, 16), (6, 6, 6)),
    ],
)
def test_automatic_chunks(features: int, block_size: int, chunk: int) -> None:
    assert BlockLayout.of(features, block_size, 0) == BlockLayout.of(features, block_size, chunk)


@given(st.integers(1, 6000), st.sampled_from((16, 64, 256, 512)))
def test_an_automatic_chunk_leaves_no_more_channels_out_than_a_small_one(features: int, block_size: int) -> None:
    small = BlockLayout.of(features, block_size, automatic_chunk(block_size))
    assert BlockLayout.of(features, block_size, 0).rotated == small.rotated


@given(st.integers(1, 600), BLOCKS_IN_CHUNKS, CHUNKS)
@example(features=101, chunks=2, chunk=1)
@example(features=1616, chunks=2, chunk=16)
def test_blocks_are_whole_chunks_and_leave_few_channels_out(features: int, chunks: int, chunk: int) -> None:
    block_size = chunks * chunk
    assume(block_size > 1)
    layout = BlockLayout.of(features, block_size, chunk)
    assert layout.width <= block_size
    assert layout.width % chunk == 0
    assert layout.rotated == layout.count * layout.width <= features
    assert layout.skew == layout.count * layout.width * (layout.width - 1) // 2
    if layout.count:
        left_over = features - layout.rotated
        assert left_over < chunk * layout.count + chunk
        assert left_over < block_size, "room for another block"


@given(CHUNKS, BLOCKS_IN_CHUNKS, st.data())
def test_a_dimension_too_short_for_a_chunk_is_not_rotated(chunk: int, chunks: int, data: st.DataObject) -> None:
    assume(chunk * chunks > 1)
    features = data.draw(st.integers(1, max(1, chunk - 1)))
    layout = BlockLayout.of(features, chunk * chunks, chunk)
    assert (layout.count, layout.width, layout.rotated, layout.skew) == (0, 0, 0, 0)
    assert layout.channels(0, 0, 0).numel() == 0


@given(st.integers(2, 600), BLOCKS_IN_CHUNKS, CHUNKS)
def test_every_other_dimension_is(features: int, chunks: int, chunk: int) -> None:
    assume(chunk * chunks > 1 and features >= chunk)
    assert BlockLayout.of(features, chunk * chunks, chunk).count > 0


@given(layouts(), SEEDS, EPOCHS)
def test_channels_are_distinct_and_exist(layout: BlockLayout, key: int, epoch: int) -> None:
    channels = layout.channels(key, 0, epoch)
    assert channels.dtype == torch.int64
    assert len(channels.unique()) == len(channels) == layout.rotated
    assert layout.rotated == 0 or (channels.min() >= 0 and channels.max() < layout.features)


@given(CHUNKS, BLOCKS_IN_CHUNKS, st.integers(1, 6), SEEDS)
def test_channels_are_a_permutation_where_nothing_is_left_over(chunk: int, chunks: int, count: int, key: int) -> None:
    assume(chunk * chunks > 1)
    layout = BlockLayout.of(chunk * chunks * count, chunk * chunks, chunk)
    assert torch.equal(layout.channels(key, 0, 0).sort().values, torch.arange(layout.features))


@given(layouts(), SEEDS, EPOCHS)
def test_channels_move_in_runs_of_a_chunk(layout: BlockLayout, key: int, epoch: int) -> None:
    runs = layout.channels(key, 0, epoch).view(-1, layout.chunk)
    assert torch.equal(runs, runs[:, :1] + torch.arange(layout.chunk))
    assert len((runs[:, 0] % layout.chunk).unique()) <= 1, "one grid of runs for all blocks"


@given(layouts(), SEEDS, EPOCHS)
def test_kernels_may_read_a_run_at_once(layout: BlockLayout, key: int, epoch: int) -> None:
    runs = layout.channels(key, 0, epoch).view(-1, layout.run)
    assert torch.equal(runs, runs[:, :1] + torch.arange(layout.run))
    assert not (runs[:, 0] % layout.run).any()


def test_the_default_chunk_is_read_at_once() -> None:
    assert BlockLayout.of(4096, 256, 16).run == 16


@given(layouts(), SEEDS, EPOCHS)
def test_a_draw_depends_on_its_arguments_only(layout: BlockLayout, key: int, epoch: int) -> None:
    before = layout.channels(key, 0, epoch)
    torch.manual_seed(epoch)
    state = torch.get_rng_state()
    assert torch.equal(layout.channels(key, 0, epoch), before)
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is untouched"


@given(SEEDS, EPOCHS)
def test_another_epoch_side_or_key_is_another_draw(key: int, epoch: int) -> None:
    layout = BlockLayout.of(256, 64, 4)
    draws = [
        layout.channels(*which) for which in ((key, 0, epoch), (key, 0, epoch + 1), (key, 1, epoch), (key + 1, 0, epoch))
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize(("features", "chunk"), [(50, 4), (51, 4), (47, 16), (34, 1)])
def test_every_channel_takes_part_sooner_or_later(features: int, chunk: int) -> None:
    layout = BlockLayout.of(features, 16, chunk)
    assert layout.rotated < features
    drawn = torch.cat([layout.channels(0, 0, epoch) for epoch in range(300)])
    assert torch.equal(drawn.unique(), torch.arange(features))


def test_another_seed_or_name_is_another_key() -> None:
    keys = {permutation_key(seed, name) for seed in range(3) for name in ("a.weight", "b.weight", "")}
    assert len(keys) == 9
    assert max(keys) < 2**63, "a checkpoint holds it as an int64"


def test_a_resumed_run_draws_as_the_run_that_wrote_the_checkpoint() -> None:
    """Written down once: a change here scrambles every checkpoint in the world."""
    key = permutation_key(0, "layers.0.weight")
    assert key == 69707014098169124
    drawn = BlockLayout.of(19, 8, 2).channels(key, side=1, epoch=3)
    assert drawn.tolist() == [7, 8, 15, 16, 11, 12, 5, 6, 13, 14, 3, 4, 17, 18, 1, 2, 9, 10]


@pytest.mark.parametrize(("sides", "turning"), [("rows", (True, False)), ("columns", (False, True)), ("both", (True, True))])
def test_a_stack_turns_the_sides_that_are_asked_for(sides: str, turning: tuple[bool, bool]) -> None:
    both, stack = StackLayout.of((3, 40, 24), 8, 0), StackLayout.of((3, 40, 24), 8, 0, sides)
    assert (stack.rows.count > 0, stack.columns.count > 0) == turning
    assert stack.shape == both.shape
    assert stack.skew == 3 * sum(side.skew for side, turns in zip((both.rows, both.columns), turning) if turns)
    assert len(stack.columns.channels(0, 1, 0)) == stack.columns.rotated


def test_a_draw_is_the_same_whatever_the_default_device_is() -> None:
    layout = BlockLayout.of(70, 16, 4)
    drawn = layout.channels(1, 0, 2)
    with torch.device("meta"):
        assert torch.equal(layout.channels(1, 0, 2), drawn)
