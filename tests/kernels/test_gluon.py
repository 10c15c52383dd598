"""The kernels for Hopper GPUs, of both sides in one pass and of even steps; that they compile is checked in ``test_triton.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poetx_compile.kernels import (
    HALF,
    Made,
    cayley_neumann,
    decode,
    naive,
    pack_skew,
    quantize_,
    rotate_,
    spread_evenly,
    unscaled,
)
from poetx_compile.kernels.polar import kernel_for, spread_in_torch
from poetx_compile.layout import BlockLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="written for Hopper GPUs"
    ),
]
SHAPES = [(512, 768, 256, 256), (256, 640, 256, 128), (384, 512, 128, 256), (128, 128, 128, 128), (2048, 1024, 256, 256)]


def operands(
    m: int, n: int, rows: int, columns: int, dtype: torch.dtype, size: float, chunk: int = 32
) -> list[Tensor | int]:
    """A weight with its residual, and rotations by skews of a standard deviation ``size``."""
    generator = torch.Generator("cuda").manual_seed(m + n)
    normal = {"generator": generator, "device": "cuda"}
    weight = (torch.randn(m, n, **normal) * n**-0.5).to(dtype)
    residual = torch.randint(-127, 128, (m, n), dtype=torch.int8, **normal)
    layouts = BlockLayout.of(m, rows, chunk), BlockLayout.of(n, columns, chunk)
    turns = [cayley_neumann(torch.randn(layout.skew, **normal) * size, layout.width, 1.0, "tf32") for layout in layouts]
    channels = [layout.channels(1, side, 0).cuda() for side, layout in enumerate(layouts)]
    return [weight, residual, turns[0], channels[0], turns[1], channels[1], layouts[1].run]


def exact(args: list[Tensor | int]) -> Tensor:
    master = decode(args[0], args[1]).double()
    naive.rotate_(master, None, unscaled(args[2]).double(), args[3], unscaled(args[4]).double(), args[5])
    return master


def rotated(args: list[Tensor | int]) -> tuple[Tensor, Tensor]:
    weight, residual = args[0].clone(), args[1].clone()
    rotate_(weight, residual, *args[2:], "tf32")
    return weight, residual


def serves(args: list[Tensor | int]) -> bool:
    from poetx_compile.kernels import gluon_rotate

    return gluon_rotate.serves(args[:6], args[6])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [1e-3, 0.05, 10.0])
def test_agrees_with_the_oracle(shape: tuple[int, int, int, int], dtype: torch.dtype, size: float) -> None:
    args = operands(*shape, dtype, size)
    assert serves(args)
    before, expected = decode(args[0], args[1]).double(), exact(args)
    weight, residual = rotated(args)
    got = decode(weight, residual).double()
    change = torch.linalg.norm(expected - before)
    assert torch.linalg.norm(got - expected) < 4e-4 * change + 2.0**-16 * torch.linalg.norm(expected)
    places = weight.double().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((got - weight.double()).abs() <= places).all()
    assert all(torch.equal(one, other) for one, other in zip((weight, residual), rotated(args)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nothing_changes_where_nothing_turns(dtype: torch.dtype) -> None:
    args = operands(512, 512, 256, 256, dtype, 0.0)
    args[0][3] = 0
    before = decode(args[0], args[1])
    weight, residual = rotated(args)
    assert torch.equal(decode(weight, residual), before)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_every_chunk(chunk: int) -> None:
    args = operands(512, 512, 256, 256, torch.bfloat16, 1e-3, chunk)
    assert serves(args)
    got, expected = decode(*rotated(args)), exact(args)
    assert torch.linalg.norm(got - expected) < 4e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("size", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("factor", [0.0, 1e-6, 1.9, 12.0, 15.9, 1e6, 1e30])
def test_rows_of_any_size_stand_beside_the_others(factor: float, size: float) -> None:
    """What is sampled for the scale of a tile is its first 32 rows, by their places in the permutation."""
    args = operands(256, 256, 256, 256, torch.bfloat16, size)
    args[0] = args[0].sign() * args[0].abs().max()  # rows of one size: turned, they add up to the most they can
    for some in (args[3][:32], args[3][32:]):
        extreme = [args[0].clone(), *args[1:]]
        extreme[0][some] = (extreme[0][some].float() * factor).bfloat16()
        got, expected = decode(*rotated(extreme)).double(), exact(extreme)
        assert got.isfinite().all()
        change = torch.linalg.norm(expected - decode(extreme[0], extreme[1]))
        assert torch.linalg.norm(got - expected) < 4e-4 * change + 2.0**-16 * torch.linalg.norm(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tile(bad: float) -> None:
    args = operands(512, 512, 256, 256, torch.bfloat16, 1e-3)
    spoiled = [args[0].clone(), *args[1:]]
    spoiled[0][args[3][0], args[5][0]] = bad
    weight, clean = rotated(spoiled)[0], rotated(args)[0]
    tile = torch.zeros_like(weight, dtype=torch.bool)
    tile[args[3][:256, None], args[5][None, :256]] = True
    assert torch.equal(weight[~tile], clean[~tile])
    assert not weight[args[3][0], args[5][0]].isfinite()


def test_weights_that_do_not_fit_take_two_passes() -> None:
    fits = operands(512, 512, 256, 256, torch.bfloat16, 1e-3)
    ragged = operands(500, 512, 256, 256, torch.bfloat16, 1e-3)
    one_sided = [*fits[:2], None, *fits[3:]]
    assert serves(fits)
    assert not serves(ragged)
    assert not serves(one_sided)
    got, expected = decode(*rotated(ragged)), exact(ragged)
    assert torch.linalg.norm(got - expected) < 4e-5 * torch.linalg.norm(expected)


def test_weights_in_odd_places_take_two_passes() -> None:
    args = operands(256, 256, 256, 256, torch.bfloat16, 1e-3)
    odd = torch.empty(256 * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(256, 256).copy_(args[0])
    assert not serves([odd, *args[1:]])
    expected = exact(args)
    rotate_(odd, args[1], *args[2:], "tf32")
    assert torch.linalg.norm(decode(odd, args[1]) - expected) < 4e-5 * torch.linalg.norm(expected)


def test_a_kernel_that_does_not_compile_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from poetx_compile.kernels import gluon_rotate, ops

    def fail(*operands: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(ops, "_do_not_compile", set())
    monkeypatch.setattr(gluon_rotate, "rotate_", fail)
    args = operands(256, 256, 256, 256, torch.bfloat16, 1e-3)
    for _ in range(2):
        got, expected = decode(*rotated(args)), exact(args)
        assert torch.linalg.norm(got - expected) < 4e-5 * torch.linalg.norm(expected)
    assert caplog.text.count("for Hopper GPUs is done without") == 1


# --- Effective weights -----------------------------------------------------------------------------------------------


def made(m: int, n: int, rows: int, columns: int, dtype: torch.dtype, size: float, storage: str, chunk: int = 32) -> Made:
    """A stored matrix, and rotations by skews of a standard deviation ``size``."""
    weight, _, row_turn, row_channels, column_turn, column_channels, run = operands(m, n, rows, columns, dtype, size, chunk)
    scales = None
    if storage == "int8":
        weight[:, : n // 2] *= 1e-3  # groups of other sizes in one tile
        stored, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(m, -(-n // 128), dtype=torch.bfloat16)
        quantize_(stored, scales, weight)
        weight = stored
    turns = (unscaled(row_turn), row_channels, unscaled(column_turn), column_channels)
    return Made(weight, scales, *turns, dtype, run, "tf32")


def one_pass(some: Made) -> Tensor:
    """The weight by the kernel alone, in memory that was full of NaN."""
    from poetx_compile.kernels import gluon_effective

    rows, columns = some.rows.half(), some.columns.half()
    assert gluon_effective.serves(some.stored, rows, columns, some.run)
    out = torch.full(some.stored.shape, torch.nan, dtype=some.dtype, device="cuda")
    gluon_effective.effective_(
        out, some.stored, some.scales, rows, some.row_channels, columns, some.column_channels, some.run
    )
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("storage", ["int8", "bf16-lean"])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.05, 10.0])
def test_an_effective_weight_agrees_with_the_oracle(
    shape: tuple[int, int, int, int], dtype: torch.dtype, storage: str, size: float
) -> None:
    some = made(*shape, dtype, size, storage)
    expected = naive.effective(*some[:6], torch.float64)
    got = one_pass(some).double()
    assert torch.linalg.norm(got - expected) < 0.6 * (torch.finfo(dtype).eps + 2.0**-11) * torch.linalg.norm(expected)
    assert torch.equal(got, some.weight().double())
    assert torch.equal(got, one_pass(some).double())


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
def test_an_effective_weight_in_every_chunk(chunk: int) -> None:
    some = made(512, 512, 256, 256, torch.bfloat16, 0.05, "int8", chunk)
    expected = naive.effective(*some[:6], torch.float32)
    assert torch.linalg.norm(one_pass(some) - expected) < 2.0**-8 * torch.linalg.norm(expected)


@pytest.mark.parametrize("factor", [0.0, 1e-6, 12.0, 1e6, 1e30])
@pytest.mark.parametrize("storage", ["int8", "bf16-lean"])
def test_rows_of_any_size_make_an_effective_weight(factor: float, storage: str) -> None:
    some = made(256, 256, 256, 256, torch.bfloat16, 1e-3, storage)
    for rows in (some.row_channels[:32], some.row_channels[32:]):
        numbers = some.stored if some.scales is None else some.scales
        extreme = numbers.clone()
        extreme[rows] = (extreme[rows].float() * factor).bfloat16()
        other = some._replace(**{"stored" if some.scales is None else "scales": extreme})
        got, expected = one_pass(other).double(), naive.effective(*other[:6], torch.float64)
        assert got.isfinite().all()
        assert torch.linalg.norm(got - expected) < 2.0**-8 * torch.linalg.norm(expected)


def test_a_matrix_in_odd_places_is_unpacked_first() -> None:
    some = made(256, 256, 256, 256, torch.bfloat16, 1e-3, "int8")
    odd = torch.empty(256 * 256 + 1, dtype=torch.int8, device="cuda")[1:].view(256, 256).copy_(some.stored)
    torch.testing.assert_close(some._replace(stored=odd).weight(), some.weight(), rtol=2**-7, atol=1e-4)


# --- Even steps ------------------------------------------------------------------------------------------------------


def skews(blocks: int, size: float) -> Tensor:
    """Packed blocks, each of a spectrum that falls more steeply."""
    generator = torch.Generator("cuda").manual_seed(blocks)
    dense = torch.randn(blocks, 256, 256, generator=generator, device="cuda", dtype=torch.float64)
    fall = torch.linspace(0, 1.3, blocks, device="cuda", dtype=torch.float64)[:, None]
    dense *= (torch.arange(1, 257, device="cuda", dtype=torch.float64) ** -fall)[:, :, None]
    return pack_skew(dense - dense.mT).float() * size


@pytest.mark.parametrize("blocks", [1, 5, 133])
@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e15])
def test_even_steps_agree_with_the_oracle(blocks: int, size: float) -> None:
    from poetx_compile.kernels import gluon_polar

    packed = skews(blocks, size)
    assert gluon_polar.serves(packed)
    assert kernel_for(packed, 256) is gluon_polar
    got = torch.full_like(packed, torch.nan)
    gluon_polar.spread_evenly(got, packed)
    assert torch.equal(got, spread_evenly(packed, 256))
    got, wanted = (each.view(blocks, -1) / size for each in (got.double(), spread_in_torch(packed.double(), 256)))
    norm = wanted.norm(dim=1)
    assert ((got - wanted).norm(dim=1) < 0.03 * norm).all()
    torch.testing.assert_close(got.norm(dim=1), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_zeros_stay_and_what_is_not_finite_stays_in_its_block(bad: float) -> None:
    packed = skews(4, 1e-3)
    clean = spread_evenly(packed, 256).view(4, -1)
    packed.view(4, -1)[1, 700] = bad
    packed.view(4, -1)[2] = 0
    got = spread_evenly(packed, 256).view(4, -1)
    assert got[1].isnan().all()
    assert not got[2].any()
    assert torch.equal(got[::3], clean[::3])


@pytest.mark.parametrize("width", [254, 128, 512])
def test_other_widths_are_made_even_in_torch(width: int) -> None:
    packed = torch.randn(3 * width * (width - 1) // 2, device="cuda")
    assert kernel_for(packed, width) is None
    assert torch.equal(spread_evenly(packed, width), spread_in_torch(packed, width))
