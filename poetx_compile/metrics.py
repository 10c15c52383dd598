"""Numbers of each optimizer step's rotations, for whoever asks: nothing is computed until a :class:`Metrics` is made."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .factor import OrthogonalFactor
from .kernels import unscaled
from .registry import factors
from .retraction import Turns


class Metrics:
    """Watches the rotations of one model until it is closed, or no longer held.

    Costs a product per block and step, and waits for the device to take the time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: the module, compiled or not.
        """
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._last: dict[str, float | Tensor] = {}
        self._spectra: dict[str, Tensor] = {}
        _active.add(self)

    @property
    def last(self) -> dict[str, float]:
        """Numbers of the last step, by flat names that TensorBoard, W&B and a JSON line take; empty before the first.

        ``angle/NAME``: root mean square, over the rotated channels, of the angle in radians, to first order.
        ``tangent/NAME``: norm of the gradient that the optimizer saw.
        ``orthogonality/NAME``: largest entry of ``GᵀG − I``, of the rotations as they were folded.
        ``retraction_seconds``: making all rotations and folding them. ``rotation_bytes``, ``residual_bytes``: of ``q`` and of
        the digits below half precision.
        """
        return {f"poetx/{name}": float(value) for name, value in self._last.items()}

    @torch.no_grad()
    def spectrum_drift(self) -> dict[str, float]:
        """How far singular values moved since the first call, relative to the largest: what rounding did."""
        drift = {}
        for name, factor in self._watched():
            spectrum = torch.linalg.svdvals(factor.weight.detach().reshape(factor.stack.shape).to(torch.float64))
            before = self._spectra.setdefault(name, spectrum)
            drift[f"poetx/spectrum_drift/{name}"] = float((spectrum - before).abs().max() / before.max())
        return drift

    def close(self) -> None:
        """Stop watching."""
        _active.discard(self)

    def _watched(self) -> Iterator[tuple[str, OrthogonalFactor]]:
        for name, parameter in self._model.named_parameters():
            factor = factors.of_weight(parameter)
            if factor is not None:
                yield name, factor

    def _note(self, norms: dict[OrthogonalFactor, dict[str, Tensor]], seconds: float) -> None:
        mine = [(name, factor) for name, factor in self._watched() if factor in norms]
        if not mine:
            return
        self._last = {f"{kind}/{name}": value for name, factor in mine for kind, value in norms[factor].items()}
        self._last["retraction_seconds"] = seconds
        self._last["rotation_bytes"] = sum(factor.q.nbytes for _, factor in mine)
        self._last["residual_bytes"] = sum(factor.residual.nbytes for _, factor in mine if factor.residual is not None)


_active: weakref.WeakSet[Metrics] = weakref.WeakSet()


@contextmanager
def observed(work: Sequence[tuple[OrthogonalFactor, float]]) -> Iterator[Callable[[Turns], None] | None]:
    """Around a retraction: yields what should look at its rotations, None if nobody watches."""
    watching = list(_active)
    if not watching or not work:
        yield None
        return
    norms: dict[OrthogonalFactor, dict[str, Tensor]] = {}
    with torch.no_grad():
        for factor, gain in work:
            channels = factor.stack.count * sum(side.rotated for side in factor.stack.sides)
            angle = 2 * gain * factor.config.scale * factor.q.norm() * math.sqrt(2 / max(channels, 1))
            tangent = factor.q.new_zeros(()) if factor.q.grad is None else factor.q.grad.norm()
            norms[factor] = {"angle": angle, "tangent": tangent}

    def look(made: Turns) -> None:
        for factor, turns in made:
            norms[factor]["orthogonality"] = torch.stack([_orthogonality(turn) for turn in turns]).max()

    started = _now(work)
    yield look
    seconds = _now(work) - started
    for metrics in watching:
        metrics._note(norms, seconds)


def _orthogonality(turn: Tensor) -> Tensor:
    turn = unscaled(turn)
    return (turn + turn.mT + turn.mT @ turn).abs().max()


def _now(work: Sequence[tuple[OrthogonalFactor, float]]) -> float:
    for device in {factor.q.device for factor, _ in work}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()
