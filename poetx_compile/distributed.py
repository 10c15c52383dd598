"""Several ranks: ``q`` stands in W's slot while DistributedDataParallel looks for what it reduces.

Weights are sent once, when the wrapper is built. From then on gradients of ``q`` are all that travels: the same gradients, the
same optimizer and the same permutations fold the same bits on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from . import _torch
from .checkpoint import fingerprint
from .errors import PoetxError
from .factor import OrthogonalFactor, factors


@contextmanager
def skews_in_place(module: nn.Module, group: distributed.ProcessGroup | None) -> Iterator[None]:
    """Give a wrapper that is being built around ``module`` every ``q`` in the place of its weight.

    Raises:
        PoetxError: the ranks have converted different weights, or drew different permutations.
    """
    slots = [
        (owner, name, weight, factor)
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if (factor := factors.of_weight(weight)) is not None
    ]
    converted = list(dict.fromkeys(factor for *_, factor in slots))
    if converted:
        _agree(converted, group)
        for factor in converted:
            _send(factor, group)
    for owner, name, _, factor in slots:
        owner._parameters[name] = factor.q
    try:
        yield
    finally:
        for owner, name, weight, _ in slots:
            owner._parameters[name] = weight
    for factor in converted:
        factor.is_reduced = True


def check_ranks(model: nn.Module, *, repair: bool = False, group: distributed.ProcessGroup | None = None) -> None:
    """Compare the converted weights of all ranks by a checksum; every rank must call it.

    Args:
        model: the module, compiled or wrapped or neither.
        repair: send the weights of rank 0 to the others instead of raising.
        group: of ranks; by default all.

    Raises:
        PoetxError: some ranks differ; names the first weight that does.
    """
    converted = factors.of_module(model)
    if not converted:
        return
    sums = torch.stack([_checksum(factor) for factor in converted])
    gathered = [torch.empty_like(sums) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, sums, group)
    differs = [any(bool(other[place] != gathered[0][place]) for other in gathered) for place in range(len(converted))]
    if not any(differs):
        return
    if not repair:
        first = converted[differs.index(True)].name
        raise PoetxError(
            f"poetx: '{first}' and {sum(differs) - 1} more of {len(converted)} converted weights differ between ranks; call "
            "poetx_compile.check_ranks(model, repair=True) on every rank to send those of rank 0"
        )
    for factor, wrong in zip(converted, differs):
        if wrong:
            _send(factor, group)


def _agree(converted: list[OrthogonalFactor], group: distributed.ProcessGroup | None) -> None:
    drawn = [(factor.name, factor.key, factor.epoch, factor.stack) for factor in converted]
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()
    digests: list[str | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(digests, digest, group)
    if len(set(digests)) > 1:
        raise PoetxError(
            "poetx: the ranks have converted different weights or drew different permutations; prepare the same model with "
            "the same options and checkpoint on every rank before DistributedDataParallel"
        )


def _send(factor: OrthogonalFactor, group: distributed.ProcessGroup | None) -> None:
    """Weight and residual of the group's first rank, to all."""
    residual = factor.residual
    for tensor in (factor.weight.data, *(() if residual is None else (residual,))):
        distributed.broadcast(tensor, group=group, group_src=0)


def _checksum(factor: OrthogonalFactor) -> Tensor:
    weight = fingerprint(factor.weight)
    return weight if factor.residual is None else weight * 31 + fingerprint(factor.residual)


_torch.within_ddp_constructor(skews_in_place)
