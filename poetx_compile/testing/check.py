"""One model, checked against itself without rotations and against the explicit parametrisation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.tensors import map_tensors, tensors_in
from ..api import report
from ..conversion import skip_reason
from ..registry import factors
from ..report import Report
from .explicit import explicit_weight, spread

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_LARGEST_TURN = 0.05
_NOTHING = 1e-4
_INNER = {"inner": "aot_eager"}


def check_equivalence(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    **keywords: Any,
) -> Report:
    """Check on a copy of ``model`` that training it by rotations is what it claims to be.

    * Its outputs are those of the model as it is.
    * Gradients of its inputs and of all ordinary parameters are as they were.
    * The gradient of each rotation is that of the explicit parametrisation ``G_rows(q) W G_columns(q)``.
    * One step of SGD leads where the explicit parametrisation leads.
    * The report gives each parameter one line.

    The model must be deterministic in the mode in which it is given, so without dropout. ``model.double()`` makes the check
    sharp. All code that ``torch.compile`` made in this process is dropped, and made again where it is needed.

    Args:
        inputs, keywords: what the model's forward takes.
        loss: of what the model returns; by default a fixed random combination of all its floating tensors.
        options: of the backend; ``inner`` is ``aot_eager`` unless given.
        tolerance: largest relative error of a tensor, in the Euclidean norm; by default from the model's coarsest dtype.

    Returns:
        The report of the copy.

    Raises:
        AssertionError: what differs, by how much.
        PoetxError: the model or an option is refused.
    """
    loss = loss or _combination
    plain, rotated = copy.deepcopy(model), copy.deepcopy(model)
    if tolerance is None:
        dtypes = [tensor.dtype for tensor in (*model.parameters(), *tensors_in((inputs, keywords)))]
        tolerance = max((TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=TOLERANCES[torch.float64])
    torch.compiler.reset()
    optimizer = torch.optim.SGD(rotated.parameters())
    compiled = torch.compile(rotated, backend="poetx", options=_INNER | dict(options or {}))
    given = [_run(call, loss, inputs, keywords) for call in (plain, compiled)]
    for place, (expected, actual) in enumerate(zip(*given, strict=True)):
        _compare(f"output or input gradient {place}", actual, expected, tolerance)
    _compare_step(plain, rotated, optimizer, tolerance)
    found = report(rotated, show=False)
    _check_account(found, rotated)
    return found


def _run(call: Callable[..., Any], loss: Callable[[Any], Tensor], inputs: Any, keywords: Any) -> list[Tensor | None]:
    """Forward and backward; the outputs, then the gradients of inputs."""
    inputs, keywords = map_tensors(_fresh, (inputs, keywords))
    output = call(*inputs, **keywords)
    outputs = [tensor.detach().clone() for tensor in tensors_in(output)]
    loss(output).backward()
    return [*outputs, *(tensor.grad for tensor in tensors_in((inputs, keywords)) if tensor.requires_grad)]


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _combination(output: Any) -> Tensor:
    terms: list[Tensor] = []
    for place, tensor in enumerate(tensors_in(output)):
        if tensor.is_floating_point() and tensor.requires_grad:
            directions = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place)).to(tensor)
            terms.append((tensor * directions).sum())
    if not terms:
        raise AssertionError("poetx: nothing that the model returns depends on its parameters; give a loss")
    return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


def _compare_step(plain: nn.Module, rotated: nn.Module, optimizer: torch.optim.SGD, tolerance: float) -> None:
    """Compare all gradients, and where one step of SGD along them leads."""
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    moves: list[tuple[str, nn.Parameter, Tensor, Tensor]] = []
    for name, weight in rotated.named_parameters():
        dense = gradients[name]
        if dense is not None:
            moves.append((name, weight, weight.detach().clone(), _rotation_gradient(weight, dense)))
        elif weight.grad is not None and weight.grad.any():
            raise AssertionError(f"poetx: '{name}' has a gradient, and has none without rotations")
    largest = max((gradient.norm().item() for *_, gradient in moves), default=0.0)
    for name, weight, _, gradient in moves:
        _compare(f"the gradient of '{name}'", weight.grad, gradient, tolerance, _NOTHING * largest)
    optimizer.param_groups[0]["lr"] = rate = _LARGEST_TURN / max(largest, 1.0)
    optimizer.step()
    for name, weight, before, gradient in moves:
        factor = factors.of_weight(weight)
        step = -rate * gradient
        expected = before + step if factor is None else explicit_weight(factor, before.to(step.dtype), spread(factor, step))
        _compare(f"'{name}' after one step", weight.detach(), expected, tolerance)


def _rotation_gradient(weight: nn.Parameter, dense: Tensor) -> Tensor:
    """What a gradient of a weight means for its rotation, by autograd through the explicit parametrisation."""
    factor = factors.of_weight(weight)
    if factor is None:
        return dense
    q = torch.zeros_like(factor.q, requires_grad=True)
    product = (explicit_weight(factor, weight.detach().to(q.dtype), q) * dense.to(q.dtype)).sum()
    return torch.autograd.grad(product, q)[0]


def _compare(what: str, actual: Tensor | None, expected: Tensor | None, tolerance: float, floor: float = 0.0) -> None:
    """Compare in the Euclidean norm, relative to the expected one; what is smaller than ``floor`` counts as that."""
    if actual is None or expected is None:
        same = actual is expected
    elif expected.is_floating_point() and actual.shape == expected.shape:
        error = torch.linalg.vector_norm(actual.double() - expected.double()).item()
        same = error <= tolerance * max(torch.linalg.vector_norm(expected.double()).item(), floor)
    else:
        same = torch.equal(actual, expected)
    if not same:
        raise AssertionError(f"poetx: {what} differs by {_difference(actual, expected)}")


def _difference(actual: Tensor | None, expected: Tensor | None) -> str:
    if actual is None or expected is None or actual.shape != expected.shape:
        shapes = ("nothing" if tensor is None else tuple(tensor.shape) for tensor in (actual, expected))
        return "its shape: {} instead of {}".format(*shapes)
    error = torch.linalg.vector_norm(actual.double() - expected.double()) / torch.linalg.vector_norm(expected.double())
    return f"{error.item():.1e} of its size"


def _check_account(found: Report, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if [row.name for row in found.rows] != list(parameters):
        raise AssertionError("poetx: the report does not list every parameter once")
    for row in found.rows:
        is_rotated = factors.of_weight(parameters[row.name]) is not None
        if row.converted != is_rotated or (is_rotated and skip_reason(parameters[row.name]) is not None):
            raise AssertionError(f"poetx: the report says of '{row.name}' that it is {row.how}, which is not so")
