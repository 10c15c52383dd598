"""What weights start from: with ``init="row-normalised"`` a conversion rescales them, for pretraining from scratch."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ._torch.optimizers import live_optimizers
from ._torch.tensors import is_fake
from .errors import PoetxError
from .registry import factors

log = logging.getLogger(__name__)

_rescaled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weights, each with its version when it was rescaled."""


def untrained(weights: Iterable[tuple[nn.Parameter, str]]) -> set[int]:
    """The identities of those weights of a graph that are as their model made them: no optimizer's state continues their
    rotation, and none of the others was rotated yet, as where a weight was frozen until now.

    Raises:
        PoetxError: an optimizer has trained one of the weights as an ordinary one.
    """
    optimizers, weights = list(live_optimizers()), list(weights)
    has_begun = any((factor := factors.of_weight(weight)) is not None and factor.steps for weight, _ in weights)
    fresh = set()
    for weight, name in weights:
        entries = [(optimizer, entry) for optimizer in optimizers if (entry := optimizer.state.get(weight))]
        for optimizer, entry in entries:
            has_steps = (
                any(torch.is_tensor(value) and value.ndim for value in entry.values()) and int(entry.get("step", 1)) > 0
            )
            if has_steps and "poetx_live" not in entry:
                raise PoetxError(
                    f"poetx: '{name}' was trained by {type(optimizer).__name__} before, and options={{'init': 'row-normalised'}} "
                    "would rescale what it learnt: the option is for pretraining from scratch; leave it out"
                )
        if not has_begun and not any("poetx_live" in entry for _, entry in entries):
            fresh.add(id(weight))
    return fresh


def normalise_rows(weight: nn.Parameter, name: str, outputs: int | None) -> None:
    """Divide a weight ``[m, n]`` by the norms of what makes its outputs, once: rows of ``nn.Linear``, columns of ``x @ W``.

    An output then has the size of the input's root mean square, as the authors' code has it (``normalize_weights``). Rows of
    zeros stay.

    Args:
        outputs: the dimension of the outputs; None leaves the weight as it is.
    """
    if outputs is None or weight in _rescaled or is_fake(weight):
        log.info("%s keeps its initial values", name)
        return
    with torch.no_grad():
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        norms = torch.linalg.vector_norm(exact, dim=1 - outputs, keepdim=True)
        weight.copy_(exact / norms.where(norms > 0, 1))
    _rescaled[weight] = weight._version


def was_rescaled(weight: nn.Parameter) -> bool:
    return weight in _rescaled


def refuse_late_state(optimizer: Optimizer) -> None:
    """Raises:
    PoetxError: state of a rotation was loaded for a weight that was rescaled in this process, and not loaded since.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            is_saved = optimizer.state.get(weight, {}).get("poetx_live") == 0
            if is_saved and _rescaled.get(weight) == weight._version:
                raise PoetxError(
                    f"poetx: the state of {type(optimizer).__name__} was loaded after options={{'init': 'row-normalised'}} had "
                    "rescaled its weights: load the model's and the optimizer's state before the first forward"
                )
