"""Kernels are compiled while the graph is: what training will run, run once on tiny zeros, in threads beside the compiler.

Which variant of a kernel runs depends on dtypes, widths and strides, and on no count: one block serves. Triton works without
the interpreter lock, so the compiler is not held up. Nothing here has an effect but on caches.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import project
from .effective import effective
from .group import compose_
from .ops import block_gram, cayley_neumann, fits, makes_rotations, rotate_
from .polar import kernel_for, spread_evenly
from .quantize import GROUP
from .residual import HALF, master_dtype, new_residual

log = logging.getLogger(__name__)

_ALIGNED = 16
"""Triton makes variants of strides by whether they are multiples of this."""

_TOKENS = 16


class Side(NamedTuple):
    """One dimension of a weight; ``blocks`` and ``width`` are 0 where it is not rotated."""

    features: int
    blocks: int
    width: int
    run: int

    @classmethod
    def small(cls, features: int, blocks: int, width: int, run: int) -> Side:
        """The smallest dimension whose kernels are those of this one: as aligned, and with channels left out if it has any."""
        period = _ALIGNED // math.gcd(width, _ALIGNED)
        rest = features - blocks * width
        few = (blocks - 1) % period + 1 if blocks else 0
        return cls(few * width + (rest if rest <= _ALIGNED else _ALIGNED + rest % _ALIGNED), few, width, run)


class Kind(NamedTuple):
    """All that the kernels of one use of a weight depend on.

    Attributes:
        dtype: of the weight.
        stored: that of its base where it is stored lean, else None.
        residual_bits: of a folded half-precision weight.
        is_even: whether steps are made even.
        activations: dtype of its product; None for the dense route.
        bias_side: the place among rows and columns of the outputs, where the product adds a bias and they are rotated.
    """

    device: torch.device
    dtype: torch.dtype
    rows: Side
    columns: Side
    precision: str
    stored: torch.dtype | None
    residual_bits: int
    is_even: bool
    activations: torch.dtype | None = None
    bias_side: int | None = None

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.rows, self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.features, self.columns.features

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def channels(self, side: Side) -> Tensor:
        return torch.arange(side.blocks * side.width, device=self.device)

    def turns(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Rotations of rows and columns that turn nothing."""
        return [self.zeros(side.blocks, side.width, side.width, dtype=dtype) if side.width else None for side in self.sides]


def gradient(kind: Kind) -> None:
    """The backward pass: both sides at once, and each alone, as weights with many blocks do it."""
    rotated = tuple(place for place, side in enumerate(kind.sides) if side.width)
    channels = [kind.channels(side) for side in kind.sides]
    for places in dict.fromkeys((rotated, *((place,) for place in rotated))):
        sides = [kind.sides[place] for place in places]
        if kind.activations is None:
            rows, columns = (side.width if place in places else 0 for place, side in enumerate(kind.sides))
            matrix = kind.zeros(1, *kind.shape)
            project(matrix, matrix, channels[0], channels[1], (rows, columns), (kind.rows.run, kind.columns.run))
            continue
        operands = [kind.zeros(_TOKENS, side.features, dtype=kind.activations) for side in sides]
        widths, runs = [side.width for side in sides], [side.run for side in sides]
        given = operands, operands, [channels[place] for place in places], widths, runs
        if kind.bias_side in places:
            outputs = kind.sides[kind.bias_side].features
            bias = kind.zeros(outputs, dtype=kind.activations)
            bias_grad = kind.zeros(outputs, dtype=master_dtype(kind.activations))
            block_gram(*given, 1.0, bias, bias_grad, places.index(kind.bias_side))
        else:
            block_gram(*given)


def turn(kind: Kind) -> None:
    """From skew parameters to even ones, and to rotations, by kernels only: PyTorch's products change settings for all threads."""
    for side in kind.sides:
        if side.width:
            skew = kind.zeros(side.blocks * (side.width * (side.width - 1) // 2), dtype=master_dtype(kind.dtype))
            if makes_rotations(skew, side.width, kind.precision):
                cayley_neumann(skew, side.width, 1.0, kind.precision)
            if kind.is_even and kernel_for(skew, side.width):
                spread_evenly(skew, side.width)


def fold(kind: Kind) -> None:
    """Rotations into a weight; of a lean one into its rotations, and the weight that these make."""
    if not fits(kind.zeros(0), *(side.width for side in kind.sides)):
        return
    channels = [kind.channels(side) for side in kind.sides]
    steps = kind.turns(torch.float16 if kind.precision == "tf32" else master_dtype(kind.dtype))
    settings = kind.columns.run, kind.precision
    if kind.stored is None:
        if kind.dtype in HALF and kind.residual_bits != 8:
            return  # no kernel serves
        weight = kind.zeros(*kind.shape)
        residual = new_residual(weight, (1, *kind.shape), kind.residual_bits)
        rotate_(weight, residual, steps[0], channels[0], steps[1], channels[1], *settings)
        return
    m, n = kind.shape
    stored = kind.zeros(m, n, dtype=kind.stored)
    scales = kind.zeros(m, -(-n // GROUP), dtype=torch.bfloat16) if kind.stored == torch.int8 else None
    turns = kind.turns(master_dtype(kind.dtype))
    effective(stored, scales, turns[0], channels[0], turns[1], channels[1], kind.dtype, *settings)
    for place, (whole, step) in enumerate(zip(turns, steps)):
        if whole is not None and step is not None:
            compose_(whole, step, from_left=place == 0)


PARTS: tuple[Callable[[Kind], None], ...] = (gradient, turn, fold)
"""They have no kernel in common, so that each may have a thread of its own."""

_known: set[Kind] = set()
_running: set[threading.Thread] = set()
_leaving = threading.Event()


def start(kinds: Iterable[Kind]) -> None:
    """Rehearse, in the background, what no weight needed before."""
    fresh = [kind for kind in dict.fromkeys(kinds) if kind not in _known and _has_kernels(kind)]
    if not fresh:
        return
    join()
    _known.update(fresh)
    for part in PARTS:
        thread = threading.Thread(
            target=_rehearse, args=(part, fresh), name=f"poetx rehearsal: {part.__name__}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the process may have no more of them
            log.debug("no thread to rehearse %s", part.__name__, exc_info=True)
        else:
            _running.add(thread)


def join() -> None:
    """Wait for what :func:`start` began: no kernel is compiled twice, and none is launched beside a user's graph capture."""
    for thread in tuple(_running):
        thread.join()
        _running.discard(thread)


def _has_kernels(kind: Kind) -> bool:
    return fits(kind.zeros(0))


def _rehearse(part: Callable[[Kind], None], kinds: Iterable[Kind]) -> None:
    for kind in kinds:
        if _leaving.is_set():
            return
        try:
            with torch.no_grad(), _aside(kind.device):
                part(kind)
        except Exception:  # training will raise it where it matters
            log.debug("rehearsal of %s for %s", part.__name__, kind, exc_info=True)


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a stream that nothing else waits for.

    A thread begins on the first device. Were it to go back there, it would take memory for a context on it, in every rank.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)  # of this thread alone
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@atexit.register
def _leave() -> None:
    """A thread in the middle of a compilation would take the process down with it when the interpreter goes."""
    _leaving.set()
    join()
