"""Retraction: the rotations of many weights, made together and folded into them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import kernels
from .factor import OrthogonalFactor
from .kernels.ops import makes_rotations
from .kernels.polar import kernel_for

SKEWS_PER_BATCH = 1 << 22
"""Skew parameters that are worked on at once, in about 200 MB of scratch memory, more where one weight has more. Four times as
many, 512 blocks of 256, where kernels of ours do it: these take less, and so many keep a GPU busy."""

LIGHTER = 4
"""How much less of it our kernels are reckoned to take."""

Item = TypeVar("Item", bound=tuple[Any, ...])

Turns = list[tuple[OrthogonalFactor, list[Tensor]]]
"""Factors, each with the rotations that its :meth:`OrthogonalFactor.turns` takes."""


@torch.no_grad()
def retract_all(work: Iterable[tuple[OrthogonalFactor, float]], look: Callable[[Turns], None] | None = None) -> None:
    """Fold the rotations of many weights; blocks of one width share their launches, whatever weight they belong to.

    All rotations are made before the first weight is written: where memory for them is missing, every weight stays as it
    was. Until then they take twice the memory of all ``q`` (as much as ``q`` where they are float16). The Triton kernel
    that folds needs none beside; elsewhere the largest weight goes first, and leaves its scratch to the others.

    Args:
        work: factors, each with a gain that multiplies its ``q`` first, for optimizers that scale by the size of what they
            train.
        look: sees the rotations before they are folded.
    """
    made: Turns = []
    for batch in in_batches(work, _turns_by_kernel):
        made += _rotations(batch)
    if look is not None:
        look(made)
    _fold(sorted(made, key=lambda pair: math.prod(pair[0].stack.shape), reverse=True))


@torch.no_grad()
def spread_all(work: Iterable[OrthogonalFactor]) -> None:
    """Apply :func:`.kernels.spread_evenly` to the ``q`` of many weights, in place; blocks of one width share their products."""
    for batch in in_batches(((factor,) for factor in work), _spreads_by_kernel):
        groups: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for (factor,) in batch:
            for packed, side in factor.skews():
                groups[side.width, packed.device, packed.dtype].append(packed)
        for (width, _, dtype), members in groups.items():
            even = kernels.spread_evenly(torch.cat(members).to(kernels.master_dtype(dtype)), width)
            torch._foreach_copy_(members, even.split([len(packed) for packed in members]))


def _fold(made: Turns) -> None:
    """Write rotations into their weights; ``q ← 0``."""
    whole = [pair for pair in made if pair[0].base is None]
    together = [pair for pair in whole if pair[0].weight.is_contiguous()]
    one_by_one = [[pair] for pair in whole if not pair[0].weight.is_contiguous()]  # they are copied
    for some in (together, *one_by_one):
        _turn(some)
    for factor, rotations in made:
        if factor.base is not None:
            factor.turn_base(rotations)
    if made:
        torch._foreach_zero_([factor.q for factor, _ in made])
    for factor, _ in made:
        factor.forget()


def _turn(made: Turns) -> None:
    """Rotate weights that are stored as themselves, together."""
    held = [(factor, factor.matrices(), rotations) for factor, rotations in made]
    try:
        kernels.rotate_all_(turn for factor, matrices, rotations in held for turn in factor.turns(matrices, rotations))
    finally:  # some may have turned
        for factor, matrices, _ in held:
            factor.write(matrices)


def in_batches(work: Iterable[Item], is_light: Callable[[OrthogonalFactor], bool] = lambda _: False) -> Iterator[list[Item]]:
    """Cut work, each item a tuple that begins with a factor, into parts of about :data:`SKEWS_PER_BATCH`.

    Args:
        is_light: whether kernels of ours do the work on a factor.
    """
    batch: list[Item] = []
    size = 0.0
    for item in work:
        batch.append(item)
        size += item[0].q.numel() / (LIGHTER if is_light(item[0]) else 1)
        if size >= SKEWS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _turns_by_kernel(factor: OrthogonalFactor) -> bool:
    return all(makes_rotations(factor.q, side.width, factor.precision) for side in factor.stack.sides)


def _spreads_by_kernel(factor: OrthogonalFactor) -> bool:
    return all(kernel_for(factor.q, side.width) is not None for side in factor.stack.sides)


def _rotations(batch: list[tuple[OrthogonalFactor, float]]) -> Turns:
    groups: dict[tuple[Any, ...], list[tuple[OrthogonalFactor, int, int, Tensor]]] = defaultdict(list)
    for factor, gain in batch:
        for place, (packed, side) in enumerate(factor.skews()):
            key = (side.width, gain * factor.config.scale, factor.precision, packed.device, packed.dtype)
            groups[key].append((factor, place, side.count, packed))
    rotations: dict[OrthogonalFactor, dict[int, Tensor]] = {factor: {} for factor, _ in batch}
    for (width, scale, precision, *_), members in groups.items():
        skews = torch.cat([packed for *_, packed in members])
        turned = kernels.cayley_neumann(skews.to(kernels.master_dtype(skews.dtype)), width, scale, precision)
        parts = turned.split([count for _, _, count, _ in members])
        for (factor, place, *_), part in zip(members, parts):
            rotations[factor][place] = part
    return [(factor, [part for _, part in sorted(parts.items())]) for factor, parts in rotations.items()]
