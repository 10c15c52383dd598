"""Several ranks: ``q`` stands in W's slot while DistributedDataParallel looks for what it reduces.

Weights are sent once, when the wrapper is built. From then on gradients of ``q`` are all that travels: the same gradients, the
same optimizer and the same permutations fold the same bits on every rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._torch.data_parallel import after_ddp_join, before_fsdp_constructor, count_in_ddp_pieces, within_ddp_constructor
from ._torch.optimizers import steps_running
from .errors import PoetxError, PoetxWarning
from .factor import OrthogonalFactor
from .fingerprint import fingerprint
from .registry import factors

Group: TypeAlias = "distributed.ProcessGroup | None"

_SHARED = ("scale", "updates", "precision", "permutation_period", "residual_bits", "storage", "skew_dtype")


@contextmanager
def skews_in_place(module: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Give a wrapper that is being built around ``module`` every ``q`` in the place of its weight.

    Raises:
        PoetxError: the ranks have converted different weights, or drew different permutations; or the wrapper looks for
            unused parameters, and would take those on the dense route for such.
    """
    slots = [
        (owner, name, weight, factor)
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if (factor := factors.of_weight(weight)) is not None
    ]
    converted = list(dict.fromkeys(factor for *_, factor in slots))
    if converted:
        mesh = arguments.get("device_mesh")
        group: Group = mesh.get_group(mesh_dim=0) if mesh is not None else arguments.get("process_group")
        _agree(converted, group)
        _refuse_search(converted, arguments)
        for factor in converted:
            factor.follow_weight()
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


def check_ranks(model: nn.Module, *, repair: bool = False, group: Group = None) -> None:
    """Compare the converted weights of all ranks by a checksum; every rank must call it.

    Args:
        model: the module, compiled or wrapped or neither.
        repair: send the weights of rank 0 to the others, and warn, instead of raising.
        group: of ranks; by default all. Without one, in a script that runs alone, nothing is compared.

    Raises:
        PoetxError: some ranks differ; names the first weight that does, as ``model`` does.
    """
    named = {factor: name for name, weight in model.named_parameters() if (factor := factors.of_weight(weight)) is not None}
    converted = list(named)
    if not converted or not distributed.is_initialized():
        return
    sums = torch.stack([_checksum(factor) for factor in converted])
    gathered = [torch.empty_like(sums) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, sums, group)
    differs = [any(bool(other[place] != gathered[0][place]) for other in gathered) for place in range(len(converted))]
    if not any(differs):
        return
    first = named[converted[differs.index(True)]]
    found = f"'{first}' and {sum(differs) - 1} more of {len(converted)} converted weights"
    if not repair:
        raise PoetxError(
            f"poetx: {found} differ between ranks; call poetx_compile.check_ranks(model, repair=True) on every rank to send those "
            "of rank 0"
        )
    for factor, wrong in zip(converted, differs):
        if wrong:
            _send(factor, group)
    warnings.warn(f"poetx: {found} differed between ranks; all have those of rank 0 now", PoetxWarning, stacklevel=2)


def watch_ranks(
    model: nn.Module, optimizer: Optimizer, *, every: int = 100, repair: bool = False, group: Group = None
) -> RemovableHandle:
    """Call ``check_ranks`` after each ``every``-th step of ``optimizer``, which all ranks must step equally often.

    Args:
        model, repair, group: as for ``check_ranks``.
        optimizer: that holds the converted weights; of accelerate's wrapper, the ``optimizer`` inside.
        every: steps from one comparison to the next.

    Returns:
        A handle, whose ``remove()`` ends the watch.

    Raises:
        PoetxError: ``every`` is below 1, or ``optimizer`` takes no hooks; at a step, what ``check_ranks`` raises.
    """
    if every < 1:
        raise PoetxError(f"poetx: every={every} is not a number of steps from 1 on")
    steps = 0

    @torch._dynamo.disable
    def after_step(*_: Any) -> None:
        nonlocal steps
        if steps_running(optimizer) > 1:  # a subclass calls super().step()
            return
        steps += 1
        if steps % every == 0:
            check_ranks(model, repair=repair, group=group)

    try:
        return optimizer.register_step_post_hook(after_step)
    except AttributeError:
        raise PoetxError(
            f"poetx: {type(optimizer).__name__} takes no hooks; give watch_ranks the torch optimizer that it wraps"
        ) from None


def _agree(converted: list[OrthogonalFactor], group: Group) -> None:
    drawn = [
        (
            factor.name,
            factor.key,
            factor.epoch,
            factor.steps,
            factor.stack,
            *(getattr(factor.config, name) for name in _SHARED),
        )
        for factor in converted
    ]
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()
    digests: list[str | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(digests, digest, group)
    if len(set(digests)) > 1:
        raise PoetxError(
            "poetx: the ranks have converted different weights or drew different permutations; prepare the same model with "
            "the same options and checkpoint on every rank before DistributedDataParallel"
        )


def _refuse_search(converted: list[OrthogonalFactor], arguments: Mapping[str, Any]) -> None:
    dense = next((factor.name for factor in converted if factor.route == "dense"), None)
    if dense is not None and arguments.get("find_unused_parameters") and not arguments.get("static_graph"):
        raise PoetxError(
            f"poetx: DistributedDataParallel(find_unused_parameters=True) takes '{dense}' for unused, since its gradient is made "
            "from that of the whole weight; build it with static_graph=True instead, which finds unused parameters too"
        )


def follow_join(module: nn.Module, group: Group, source: int) -> None:
    """Let the ranks that ran out of inputs early go on as the one whose weights they just received.

    Args:
        source: its rank in the group.
    """
    converted = factors.of_module(module)
    if not converted:
        return
    counts = torch.tensor([(factor.epoch, factor.steps) for factor in converted], device=converted[0].q.device)
    distributed.broadcast(counts, group=group, group_src=source)
    for factor, (epoch, steps) in zip(converted, counts.tolist()):
        for tensor in factor.kept.values():
            distributed.broadcast(tensor, group=group, group_src=source)
        factor.resume(factor.key, epoch, steps, factor.kept or None)


def refuse_shards(module: nn.Module) -> None:
    """Raises:
    PoetxError: some weights of ``module``, which is about to be sharded, are converted.
    """
    converted = factors.of_module(module)
    if converted:
        raise PoetxError(
            f"poetx: '{converted[0].name}' is converted, and FullyShardedDataParallel would cut it into shards that cannot be "
            "rotated: use DistributedDataParallel, or call poetx_compile.restore(model) and compile with backend='inductor'"
        )


def _send(factor: OrthogonalFactor, group: Group) -> None:
    """All that makes up the weight of the group's first rank, to all."""
    for tensor in _parts(factor):
        distributed.broadcast(tensor, group=group, group_src=0)
    if factor.base is not None:
        factor.base.is_turned = True
        factor.origin = _sent(factor.origin, factor.q.device, group)


def _sent(number: Tensor | None, device: torch.device, group: Group) -> Tensor | None:
    """An int64 of the group's first rank, or its None."""
    told = torch.zeros(2, dtype=torch.int64, device=device)
    if number is not None:
        told[0], told[1] = 1, number
    distributed.broadcast(told, group=group, group_src=0)
    return told[1] if int(told[0]) else None


def _parts(factor: OrthogonalFactor) -> list[Tensor]:
    own = [factor.weight.data] if factor.base is None else []
    return [*own, *factor.kept.values()]


def _checksum(factor: OrthogonalFactor) -> Tensor:
    sums = [fingerprint(part) for part in _parts(factor)]
    return sum((31**place * total for place, total in enumerate(reversed(sums))), torch.zeros_like(sums[0]))


def _reduced_bytes(parameter: Tensor) -> int | None:
    factor = factors.of_weight(parameter)
    return None if factor is None else factor.q.nbytes


within_ddp_constructor(skews_in_place)
count_in_ddp_pieces(_reduced_bytes)
after_ddp_join(follow_join)
before_fsdp_constructor(refuse_shards)
