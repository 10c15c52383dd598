"""``W.grad`` is ``q.grad``: what scripts read, clip, unscale and zero on the weight is the gradient of its rotation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import coverage
from ._torch.compilers import is_tracing
from ._torch.parameters import hide_from_fakes, own_grad, replace_grad_attribute, set_own_grad
from .factor import OrthogonalFactor
from .registry import factors


def attach(factor: OrthogonalFactor) -> None:
    """Show ``q``'s gradient as the weight's, and project whatever gradient autograd brings to the weight itself.

    A gradient that the weight already holds is projected too.
    """
    _install()
    weight = factor.weight
    before = own_grad(weight)
    set_own_grad(weight, None)
    factors.add(factor)
    factor.hook = weight.register_post_accumulate_grad_hook(_project)
    coverage.watch(factor)
    if before is not None:
        weight.grad = before


def detach(factor: OrthogonalFactor) -> None:
    """Undo :func:`attach`: the weight's gradient is its own again."""
    if factor.hook is not None:
        factor.hook.remove()
    factors.remove(factor)
    coverage.forget(factor)


@functools.cache
def _install() -> None:
    replace_grad_attribute(_read, _write)
    hide_from_fakes(lambda tensor: factors.of_weight(tensor) is not None)


def _read(parameter: nn.Parameter) -> Tensor | None:
    factor = factors.of_weight(parameter)
    if factor is None:
        return own_grad(parameter)
    grad = factor.q.grad
    if grad is not None and not factor.is_covered and not is_tracing():
        coverage.check()
    return grad


def _write(parameter: nn.Parameter, grad: Tensor | None) -> None:
    factor = factors.of_weight(parameter)
    if factor is None:
        set_own_grad(parameter, grad)
    elif grad is not None and grad.shape == parameter.shape:
        factor.q.grad = factor.project(grad)
    else:
        factor.q.grad = grad


def _project(weight: Tensor) -> None:
    factor = factors.of_weight(weight)
    grad = own_grad(weight)
    if factor is None or grad is None:
        return
    set_own_grad(weight, None)
    packed = factor.project(grad)
    if factor.is_reduced:  # through autograd, whose hooks on ``q`` are what DistributedDataParallel waits for
        with torch.enable_grad():
            torch.autograd.backward(factor.q.view_as(factor.q), packed)
    else:
        factor.q.grad = packed if factor.q.grad is None else factor.q.grad.add_(packed)
