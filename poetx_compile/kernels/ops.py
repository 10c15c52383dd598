"""Schemas of the operations, with shapes for tracing and an implementation for each device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import naive, wide
from .gram import GramSide
from .precision import PRECISIONS, unscaled
from .residual import HALF, master_dtype
from .tuning import WIDEST

log = logging.getLogger(__name__)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DONE_WITHOUT = (
    "the kernel %s for Hopper GPUs is done without, which is slower: %s. Of several ranks that do not all say so, call "
    "poetx_compile.check_ranks(model, repair=True)"
)
_ON_HOST = (
    "no memory on the device to rotate a weight of %d x %d: it was rotated on the host. Of several ranks, call "
    "poetx_compile.check_ranks(model, repair=True)"
)

_do_not_compile: set[tuple[str, torch.device]] = set()

library = torch.library.Library("poetx", "DEF")
library.define(
    "block_gram(Tensor[] left, Tensor[] right, Tensor[] channels, int[] width, int[] run, float scale=1.0,"
    " Tensor? bias=None, Tensor? bias_grad=None, int bias_side=0) -> Tensor"
)
library.define("cayley_neumann(Tensor skew, int width, float scale, str precision='tf32x3') -> Tensor")
library.define(
    "rotate_(Tensor(a!) weight, Tensor(b!)? residual, Tensor? rows, Tensor row_channels, Tensor? columns,"
    " Tensor column_channels, int run=1, str precision='tf32x3', int? seed=None) -> ()"
)


def _block_gram(
    left: list[Tensor],
    right: list[Tensor],
    channels: list[Tensor],
    width: list[int],
    run: list[int],
    scale: float = 1.0,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    bias_side: int = 0,
) -> Tensor:
    sides = [GramSide(*side) for side in zip(left, right, channels, width, run)]
    if fits(left[0]):
        from . import triton_gram

        with torch.cuda.device(left[0].device):
            return triton_gram.block_gram(sides, scale, bias, bias_grad, bias_side)
    skews = [naive.block_gram(*side[:4]) for side in sides]
    if bias is not None and bias_grad is not None:
        _, _, biased, block, _ = sides[bias_side]
        skews[bias_side] -= naive.block_gram(bias_grad[None], bias[None].to(bias_grad.dtype), biased, block)
    return torch.cat(skews) * scale


def _cayley_neumann(skew: Tensor, width: int, scale: float, precision: str = "tf32x3") -> Tensor:
    _check(precision)
    if makes_rotations(skew, width, precision):
        from . import triton_cayley

        with torch.cuda.device(skew.device):
            return triton_cayley.cayley_neumann(skew, width, scale, precision)
    return naive.cayley_neumann(skew, width, scale)


def rotate_in_place(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    run: int = 1,
    precision: str = "tf32x3",
    seed: int | None = None,
) -> None:
    widths = [side.shape[-1] for side in (rows, columns) if side is not None]
    rows, columns = (None if side is None else side.contiguous() for side in (rows, columns))
    _check(precision)
    stored = [weight] if residual is None else [weight, residual]
    is_whole = weight.dtype not in HALF if residual is None else residual.dtype == torch.int8
    if fits(weight, *widths) and is_whole and all(tensor.is_contiguous() for tensor in stored):
        from . import triton_rotate

        sides = (rows, row_channels, columns, column_channels)
        with torch.cuda.device(weight.device):
            group = [(weight, residual, *sides)]
            if not (is_for_one_pass(*group[0], run=run) and rotate_in_one_pass(group, run, distances_for_one_pass(group))):
                triton_rotate.rotate_(weight, residual, *sides, run, precision)
    else:
        operands: tuple[Any, ...] = weight, residual, rows, row_channels, columns, column_channels
        try:
            _rotate_naively(*operands, seed=seed)
        except torch.OutOfMemoryError:  # others may have been folded by now: so must this one, by the host's memory
            log.warning(_ON_HOST, *weight.shape)
            on_host: tuple[Any, ...] = tuple(None if tensor is None else tensor.cpu() for tensor in operands)
            _rotate_naively(*on_host, seed=seed)
            for tensor, turned in zip(operands[:2], on_host):
                if tensor is not None:
                    tensor.copy_(turned)


def _rotate_naively(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    *,
    seed: int | None,
) -> None:
    are_half = all(side is None or side.dtype == torch.float16 for side in (rows, columns))
    turn = wide.turn_ if are_half else None
    if turn is None:
        rows, columns = (None if side is None else unscaled(side) for side in (rows, columns))
    naive.rotate_(weight, residual, rows, row_channels, columns, column_channels, seed, turn)


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"poetx: precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def fits(tensor: Tensor, *widths: int) -> bool:
    """Whether the Triton kernels serve: a GPU, no float64, and blocks that stay in registers where ``widths`` are given."""
    return tensor.is_cuda and _HAS_TRITON and tensor.dtype != torch.float64 and max(widths, default=0) <= WIDEST


def makes_rotations(skew: Tensor, width: int, precision: str) -> bool:
    """Whether the Triton kernels make rotations: at ``tf32`` of any width."""
    return fits(skew) if precision == "tf32" else fits(skew, width)


def is_for_one_pass(*operands: Tensor | None, run: int) -> bool:
    """Whether a kernel rotates both sides of a weight at once; ``operands`` as ``rotate_`` takes them, up to the channels."""
    weight = operands[0]
    assert weight is not None
    kernel = for_hopper("gluon_rotate", weight.device) if fits(weight) else None
    return (
        kernel is not None
        and (kernel.rotate_.__module__, weight.device) not in _do_not_compile
        and kernel.serves(operands, run)
    )


def distances_for_one_pass(operands: Sequence[Any]) -> Tensor:
    """All the memory that :func:`rotate_in_one_pass` takes."""
    distances: Tensor = for_hopper("gluon_rotate", operands[0][0].device).distances_of(operands)
    return distances


def rotate_in_one_pass(operands: Sequence[Any], run: int, distances: Tensor) -> bool:
    """Rotate weights of one shape, each :func:`is_for_one_pass`, in one launch; False where the kernel does not compile."""
    device = operands[0][0].device
    return succeeds(for_hopper("gluon_rotate", device).rotate_, device, operands, run, distances)


def succeeds(launch: Callable[..., None], device: torch.device, *operands: Any) -> bool:
    """Launch a kernel of :func:`for_hopper`, and say whether it compiles for this device: if not, nothing is written."""
    from triton.errors import TritonError

    if (launch.__module__, device) in _do_not_compile:
        return False
    try:
        launch(*operands)
    except (TritonError, RuntimeError) as error:  # compilation comes before the launch
        if "[CUDA]" not in str(error):  # of the driver, which may have memory again next time
            _do_not_compile.add((launch.__module__, device))
        log.warning(_DONE_WITHOUT, launch.__module__.rpartition(".")[2], error)
        return False
    return True


@functools.cache
def for_hopper(name: str, device: torch.device) -> Any:
    """The module of a kernel that is written for Hopper GPUs, on these; else None."""
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return importlib.import_module(f".{name}", __package__)
    except (ImportError, AttributeError) as error:
        log.warning(_DONE_WITHOUT, name, error)
        return None


for _device in ("CPU", "CUDA"):
    library.impl("block_gram", _block_gram, _device)
    library.impl("cayley_neumann", _cayley_neumann, _device)
    library.impl("rotate_", rotate_in_place, _device)


@torch.library.register_fake("poetx::block_gram", lib=library)
def _(
    left: list[Tensor],
    right: list[Tensor],
    channels: list[Tensor],
    width: list[int],
    run: list[int],
    *others: Any,
    **by_name: Any,
) -> Tensor:
    skew = sum(GramSide(*side).skew for side in zip(left, right, channels, width, run))
    return left[0].new_empty(skew, dtype=master_dtype(left[0].dtype))


@torch.library.register_fake("poetx::cayley_neumann", lib=library)
def _(skew: Tensor, width: int, scale: float, precision: str = "tf32x3") -> Tensor:
    dtype = torch.float16 if precision == "tf32" and fits(skew) else skew.dtype
    return skew.new_empty(skew.shape[0] // (width * (width - 1) // 2), width, width, dtype=dtype)


@torch.library.register_fake("poetx::rotate_", lib=library)
def _(*operands: Any, **by_name: Any) -> None:
    return None


block_gram = torch.ops.poetx.block_gram.default
cayley_neumann = torch.ops.poetx.cayley_neumann.default
rotate_ = torch.ops.poetx.rotate_.default
