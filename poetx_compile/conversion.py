"""Turning a weight into a rotated one, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import coverage, gradient, initial, optimizer, stand_in
from ._torch.data_parallel import active_ddp, distributed_wrapper
from ._torch.tensors import is_fake
from .config import PoetxConfig
from .errors import PoetxError
from .factor import OrthogonalFactor
from .kernels import HALF
from .kernels.rehearsal import Kind, Side
from .passes import LinearMatch, Skip, SkipReason, bias_of, is_named, outputs_of, unfit
from .registry import factors

_skipped: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_BINDING = {
    SkipReason.EMBEDDING,
    SkipReason.TIED,
    SkipReason.NOT_A_MATRIX,
    SkipReason.NOT_A_LINEAR,
    SkipReason.GROUPED,
    SkipReason.NO_INPUT,
    SkipReason.HEAD,
    SkipReason.GRADIENT_HOOK,
    SkipReason.ZERO,
}
_EXPECTED = {SkipReason.FROZEN, SkipReason.EXCLUDED, SkipReason.NOT_A_MATRIX}
"""Why a weight stays ordinary without surprise."""
_FIXED = (
    "block_size",
    "chunk",
    "precision",
    "scale",
    "seed",
    "permutation_period",
    "residual_bits",
    "storage",
    "skew_dtype",
    "include_conv",
    "sides",
    "init",
    "moments",
)


def adopt(
    weight: nn.Parameter,
    name: str,
    config: PoetxConfig,
    matrices: tuple[int, int, int] | None = None,
    outputs: int | None = None,
    storage: str = "folded",
) -> OrthogonalFactor:
    """The factor of a weight, made if there is none yet.

    The weight's values stay, unless ``config.init`` says otherwise. :func:`.stand_in.pack` stores them lean.

    Args:
        matrices: the stack ``[count, m, n]`` as which the weight is rotated; by default over its last two dimensions.
        outputs: the dimension of a matrix along which its outputs lie, for ``config.init``; None keeps the values.
        storage: of a weight that has no factor yet: what :func:`storage_for` says of its use.

    Raises:
        PoetxError: the weight was converted with other settings.
    """
    factor = factors.of_weight(weight)
    if factor is None:
        if config.init != "keep":
            initial.normalise_rows(weight, name, outputs)
        factor = OrthogonalFactor(weight, name, config, matrices, storage)
        gradient.attach(factor)
        _skipped.pop(weight, None)
        return factor
    for field in _FIXED:
        before, now = getattr(factor.config, field), getattr(config, field)
        if before != now:
            raise PoetxError(
                f"poetx: '{factor.name}' was converted with {field}={before} and is now compiled with {field}={now}; use "
                "one setting for every compilation of a model, or call poetx_compile.restore(model) between"
            )
    if is_named(name, config.exclude):
        raise PoetxError(
            f"poetx: '{factor.name}' was converted before and is excluded now; exclude it from the first compilation on, or call "
            "poetx_compile.restore(model) between"
        )
    factor.follow_weight()
    return factor


def storage_for(found: LinearMatch, config: PoetxConfig) -> str:
    """How a weight is to be stored: lean where that is asked for, and products alone use it."""
    is_fit = bool(found.uses) and found.weight.dtype in HALF and found.weight.is_contiguous()
    return config.storage if is_fit else "folded"


def kinds(found: LinearMatch, factor: OrthogonalFactor) -> list[Kind]:
    """On what the kernels of each use of a converted weight depend; nothing of a weight without values."""
    if is_fake(found.weight):
        return []
    sides = (factor.rows, factor.columns)
    rows, columns = (Side.small(side.features, side.count, side.width, side.run) for side in sides)
    stored = factor.inputs.get("stored")
    of_weight = Kind(
        factor.q.device,
        factor.dtype,
        rows,
        columns,
        factor.precision,
        None if stored is None else stored.dtype,
        factor.config.residual_bits,
        factor.config.updates == "orthogonal",
    )
    if factor.route == "dense":
        return [of_weight]
    return [of_weight._replace(activations=_dtype(use, factor), bias_side=_bias_side(use, factor)) for use in found.uses]


def _dtype(use: fx.Node, factor: OrthogonalFactor) -> torch.dtype:
    """Of what a product gives, which autocast may have lowered."""
    return getattr(use.meta.get("example_value"), "dtype", factor.dtype)


def _bias_side(use: fx.Node, factor: OrthogonalFactor) -> int | None:
    place = outputs_of(use)
    is_rotated = (factor.rows, factor.columns)[place].count > 0
    return place if is_rotated and bias_of(use) is not None else None


def adopt_late(
    weight: nn.Parameter,
    name: str,
    config: PoetxConfig,
    matrices: tuple[int, int, int] | None = None,
    outputs: int | None = None,
    storage: str = "folded",
) -> OrthogonalFactor:
    """Convert a weight that meets compiled code made for another: a second instance, a copy, a replaced parameter.

    Raises:
        PoetxError: this weight cannot be rotated, though the code was compiled for one that can; or ``config.init`` would
            rescale what it learnt.
    """
    reason = unfit(weight, matrices)
    if reason is not None:
        raise PoetxError(
            f"poetx: '{name}' shares compiled code with a converted weight, but this one cannot be converted: "
            f"{reason.value}. Leave all of them out with options={{'exclude': ['{name}']}}"
        )
    if config.init != "keep" and id(weight) not in initial.untrained([(weight, name)]):
        outputs = None
    return adopt(weight, name, config, matrices, outputs, storage)


def release(weight: nn.Parameter) -> OrthogonalFactor | None:
    """Make a weight ordinary again. Its values stay; its gradient, if it was a rotation's, goes."""
    _skipped.pop(weight, None)
    coverage.let_go(weight)
    factor = factors.of_weight(weight)
    if factor is not None:
        weight.grad = None
        stand_in.unpack(factor)
        gradient.detach(factor)
    return factor


@contextmanager
def undone_if_raised(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """If something is raised inside, those of the weights that were converted there are as they were before."""
    before = [(weight, weight.grad, skip_reason(weight)) for weight in weights if factors.of_weight(weight) is None]
    try:
        yield
    except BaseException:
        optimizer.part([factor for weight, *_ in before if (factor := factors.of_weight(weight)) is not None])
        for weight, grad, reason in before:
            if release(weight) is not None:
                weight.grad = grad
            if reason is not None:
                _skipped[weight] = reason
        raise


def refuse_distributed(weights: Iterable[nn.Parameter]) -> None:
    """Raises:
    PoetxError: a distributed wrapper manages some of these weights, and would wait for gradients that never come.
    """
    unknown = [weight for weight in weights if (factor := factors.of_weight(weight)) is None or not factor.is_reduced]
    if not unknown:
        return
    wrapper = "DistributedDataParallel" if active_ddp() else distributed_wrapper(unknown)
    if wrapper == "DistributedDataParallel":
        raise PoetxError(
            "poetx: DistributedDataParallel was built before the linear layers of this model were converted, and waits for "
            "gradients that never come. Add the line  poetx_compile.prepare(model, batch)  before DistributedDataParallel(model)"
        )
    if wrapper is not None:
        raise PoetxError(
            f"poetx: this model is wrapped in {wrapper}, whose shards cannot be rotated: use DistributedDataParallel, or "
            "compile with backend='inductor'"
        )


def remember(skips: Iterable[Skip]) -> None:
    for skip in skips:
        _skipped[skip.weight] = skip.reason
        if skip.reason not in _EXPECTED:
            coverage.leave(skip.weight, skip.name, skip.reason.value)


def remember_alike(parameters: Iterable[tuple[nn.Parameter, SkipReason]]) -> None:
    """Of parameters that meet code compiled for others: each stays ordinary for the reason that the other did."""
    for parameter, reason in parameters:
        if factors.of_weight(parameter) is None:
            _skipped.setdefault(parameter, reason)


def skip_reason(weight: nn.Parameter) -> SkipReason | None:
    """Why the last graph that held a weight left it alone; None if it is converted, or in no graph yet."""
    return _skipped.get(weight)


def binding_reason(weight: nn.Parameter) -> SkipReason | None:
    """The part of :func:`skip_reason` that holds in every other graph too.

    A weight that has trained as an ordinary one for some steps cannot become a rotation when a new batch size brings a new
    graph: its optimizer state would be that of a matrix.
    """
    reason = skip_reason(weight)
    return reason if reason in _BINDING else None
