"""Many matrices at once are turned as each alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poetx_compile.kernels import HALF, Turn, cayley_neumann, new_residual, ops, rotate_, rotate_all_
from poetx_compile.layout import BlockLayout


def turn(
    m: int, n: int, width: int, dtype: torch.dtype, seed: int, device: str = "cpu", sides: str = "both", bits: int = 8
) -> Turn:
    """A weight, and rotations of a size that differs from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    precision = "tf32" if dtype in HALF else "tf32x3"
    weight = torch.randn(m, n, generator=generator).to(device, dtype)
    residual = new_residual(weight, (1, m, n), bits)
    if residual is not None and bits == 4:
        residual = residual[0]
    elif residual is not None:
        residual.copy_(torch.randint(-127, 128, (m, n), generator=generator))
    layouts = BlockLayout.of(m, width, 16), BlockLayout.of(n, width, 16)
    turns = [
        cayley_neumann(
            (torch.randn(layout.skew, generator=generator) * 0.01 * seed).to(device), layout.width, 1.0, precision
        )
        for layout in layouts
    ]
    channels = [layout.channels(seed, side, 0).to(device) for side, layout in enumerate(layouts)]
    rows, columns = turns[0] if sides != "columns" else None, turns[1] if sides != "rows" else None
    return Turn(weight, residual, rows, channels[0], columns, channels[1], layouts[1].run, precision, seed)


def copied(turns: list[Turn]) -> list[Turn]:
    return [
        each._replace(weight=each.weight.clone(), residual=None if each.residual is None else each.residual.clone())
        for each in turns
    ]


def stored(turns: list[Turn]) -> list[Tensor]:
    return [tensor for each in turns for tensor in each[:2] if tensor is not None]


def check(turns: list[Turn]) -> None:
    """To the last bit."""
    before, alone = copied(turns), copied(turns)
    for each in alone:
        rotate_(*each)
    rotate_all_(turns)
    assert all(torch.equal(one, other) for one, other in zip(stored(turns), stored(alone)))
    assert not any(torch.equal(one.weight, other.weight) for one, other in zip(turns, before))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([(32, 48), (48, 32), (32, 50)]),
            st.sampled_from([torch.float32, *HALF]),
            st.sampled_from(["both", "rows", "columns"]),
            st.sampled_from([0, 4, 8]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_on_a_cpu(kinds: list[tuple[tuple[int, int], torch.dtype, str, int]]) -> None:
    check(
        [
            turn(*shape, 16, dtype, seed, sides=sides, bits=bits)
            for seed, (shape, dtype, sides, bits) in enumerate(kinds, start=1)
        ]
    )


def test_none_at_all() -> None:
    rotate_all_([])


SHAPES = [(512, 768), (256, 512), (512, 768), (768, 512), (256, 512), (512, 768), (500, 512), (256, 512)]


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("width", [128, 256])
    def test_those_of_one_shape_share_a_launch(
        self, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launches: list[int] = []
        launch = ops.rotate_in_one_pass
        monkeypatch.setattr(
            ops, "rotate_in_one_pass", lambda given, *others: launches.append(len(given)) or launch(given, *others)
        )
        turns = [turn(*shape, width, dtype, seed, "cuda") for seed, shape in enumerate(SHAPES, start=1)]
        check(turns)
        if torch.cuda.get_device_capability()[0] == 9:
            assert sorted(launches) == [*[1] * 7, 1, 3, 3]  # each alone but the ragged one, then together

    def test_those_of_other_kinds_stand_beside_them(self) -> None:
        check(
            [
                turn(512, 512, 256, torch.bfloat16, 1, "cuda"),
                turn(512, 512, 256, torch.float32, 2, "cuda"),
                turn(512, 512, 256, torch.bfloat16, 3, "cuda", sides="rows"),
                turn(512, 512, 256, torch.bfloat16, 4, "cuda"),
                turn(512, 512, 128, torch.bfloat16, 5, "cuda"),
                turn(512, 512, 256, torch.bfloat16, 6, "cuda", bits=4),
            ]
        )

    def test_a_kernel_that_does_not_compile_is_done_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ops, "rotate_in_one_pass", lambda *given: False)
        check([turn(512, 512, 256, torch.bfloat16, seed, "cuda") for seed in (1, 2)])
