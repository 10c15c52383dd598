"""SkewMuon: orthogonalised updates for rotations, AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from .errors import PoetxError
from .factor import OrthogonalFactor
from .kernels import orthogonalize_skew, pack_skew, unpack_skew
from .registry import factors
from .retraction import in_batches

Turned = list[tuple[OrthogonalFactor, dict[str, Any], Tensor]]
"""Rotations that have a gradient, each with its group and the gradient of ``q``."""

ADJUSTMENTS = ("match_rms_adamw", "original")
_NEEDED = {"betas", "momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"}
"""Settings of a group that other optimizers lack, each some."""
_MOST_STEPS = 99


class SkewMuon(AdamW):
    """Muon on the Lie algebra: each block of a rotation turns all its channels by one angle.

    For a rotated weight, momentum is taken of the gradient of ``q``, unpacked to skew matrices ``[r, b, b]``, and each block is
    replaced by (nearly) its polar factor through ``ns_steps`` of a Newton–Schulz iteration, which is an odd polynomial and so
    stays skew. Names and defaults are those of ``torch.optim.Muon`` (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
    All other parameters of the model are trained by AdamW with the same ``lr``.

    The polynomial brings singular values to about 0.7 to 1.2, so a channel turns by about ``2 · scale · rate`` radians in a step,
    where ``scale`` is the backend's option and ``rate``, by ``adjust_lr_fn``, is

    * ``match_rms_adamw``: ``0.2 · lr · √b``, the size of what AdamW writes (https://arxiv.org/abs/2502.16982), so that AdamW's rate
      serves: with ``lr`` 2e-3 and blocks of 256, 0.013 radians;
    * ``original``: ``lr``, as Muon has it for square matrices.

    Build it like any optimizer, before or after the first compiled step, from all of ``model.parameters()``. The iteration runs in
    bfloat16 on a GPU, elsewhere in the dtype of ``q``, in float64 for float64.

    Raises:
        PoetxError: a setting that cannot be; at ``step()``, none of the parameters is a rotation, or loaded state is another
            optimizer's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        """Args:
        params: parameters or groups; a group may have its own of all the settings below.
        lr: of ordinary parameters; that of rotations follows from it.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: of rotations.
        betas, eps, weight_decay, foreach, fused: of AdamW for ordinary parameters.
        """
        settings = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        groups = params
        if not isinstance(params, Tensor):  # which torch refuses
            listed = list(params)
            has_groups = bool(listed) and isinstance(listed[0], dict)
            groups = [{**settings, **group} for group in listed] if has_groups else [{**settings, "params": listed}]
        super().__init__(groups, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self.defaults.update(settings)
        self._step_supports_amp_scaling = False  # GradScaler unscales for a fused AdamW too: momentum wants true gradients

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch._dynamo.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turned: Turned = [
            (factor, group, grad)
            for group in self.param_groups
            for parameter in group["params"]
            if (factor := factors.of_skew(parameter)) is not None and (grad := parameter.grad) is not None
        ]
        self._check_rotations(turned)
        for factor, _, _ in turned:
            factor.q.grad = None
        try:
            inspect.unwrap(AdamW.step)(self)  # bare: the hooks of a step run around this one
        finally:
            for factor, _, grad in turned:
                factor.q.grad = grad
        for batch in in_batches(turned):
            _turn(self._with_momentum(batch))
        return loss

    def _check_rotations(self, turned: Turned) -> None:
        held = (parameter for group in self.param_groups for parameter in group["params"])
        if not turned and not any(factors.of_skew(parameter) for parameter in held):
            why = (
                "no weight that it holds was converted; poetx_compile.report(model) says why, and which were"
                if factors
                else "run torch.compile(model, backend='poetx') before its first step, and give it model.parameters()"
            )
            raise PoetxError(f"poetx: SkewMuon trains rotations, and none of its parameters is one: {why}")
        for factor, group, _ in turned:
            entry = self.state.get(factor.q, {})
            is_foreign = bool(entry) and "momentum_buffer" not in entry
            if is_foreign or not group.keys() >= _NEEDED:  # loading brings the settings of its groups
                raise PoetxError(
                    f"poetx: the state of '{factor.name}' is another optimizer's, and SkewMuon cannot go on from it: load the "
                    "model's state_dict only"
                )
        for place, group in enumerate(self.param_groups):
            if not group.keys() >= _NEEDED:
                raise PoetxError(
                    f"poetx: the settings of parameter group {place} are another optimizer's, and SkewMuon cannot go on with them: "
                    "load the model's state_dict only"
                )

    def _with_momentum(self, batch: Turned) -> Turned:
        """What is to be orthogonalised, packed as ``q``, in the place of each gradient."""
        updated: Turned = []
        for _, members in itertools.groupby(batch, key=lambda each: id(each[1])):
            rotations, (group, *_), grads = zip(*members)
            entries = [self._entry(factor) for factor in rotations]
            averages = [entry["momentum_buffer"] for entry in entries]
            torch._foreach_add_([entry["step"] for entry in entries], 1)
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages
            updated += [(factor, group, update) for factor, update in zip(rotations, updates)]
        return updated

    def _entry(self, factor: OrthogonalFactor) -> dict[str, Any]:
        entry = self.state[factor.q]
        if not entry:
            entry["step"] = torch.zeros((), device="cpu")  # AdamW looks for it in what it loads
            entry["momentum_buffer"] = torch.zeros_like(factor.q)
        return entry


def _turn(batch: Turned) -> None:
    """Write the steps of many rotations; blocks of one width share their products, whatever weight they belong to."""
    members: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Any]]] = defaultdict(list)
    for factor, group, update in batch:
        sides = factor.stack.sides * factor.stack.count
        sizes = [side.skew for side in sides]
        for side, into, packed in zip(sides, factor.q.split(sizes), update.split(sizes)):
            key = (side.width, tuple(group["ns_coefficients"]), group["ns_steps"], packed.device, packed.dtype)
            members[key].append((into, packed, _rate(group, side.width)))
    for (width, coefficients, steps, *_), parts in members.items():
        blocks = unpack_skew(torch.cat([packed for _, packed, _ in parts]), width)
        turned = pack_skew(orthogonalize_skew(blocks, coefficients, steps)) / 2
        for (into, _, rate), part in zip(parts, turned.split([len(packed) for _, packed, _ in parts])):
            into.sub_(part * rate)


def _rate(group: dict[str, Any], width: int) -> Any:
    return group["lr"] * (0.2 * math.sqrt(width) if group["adjust_lr_fn"] == "match_rms_adamw" else 1.0)


def _check(group: dict[str, Any]) -> None:
    """Raises:
    PoetxError: a setting of rotations that cannot be.
    """
    momentum, coefficients = group["momentum"], group["ns_coefficients"]
    wrong = {
        "momentum": (isinstance(momentum, (int, float)) and 0 <= momentum < 1, "from 0 to below 1"),
        "ns_steps": (
            isinstance(group["ns_steps"], int) and 1 <= group["ns_steps"] <= _MOST_STEPS,
            f"from 1 to {_MOST_STEPS}",
        ),
        "ns_coefficients": (
            isinstance(coefficients, (tuple, list))
            and len(coefficients) == 3
            and all(isinstance(each, (int, float)) for each in coefficients),
            "three numbers",
        ),
        "adjust_lr_fn": (group["adjust_lr_fn"] in ADJUSTMENTS, f"one of {', '.join(ADJUSTMENTS)}"),
    }
    for name, (is_right, wanted) in wrong.items():
        if not is_right:
            raise PoetxError(f"poetx: SkewMuon's {name} must be {wanted}, not {group[name]!r}")
    if group.get("maximize"):
        raise PoetxError("poetx: SkewMuon does not take maximize=True; minimise the negative loss")
    if group["nesterov"] and not group["momentum"]:
        raise PoetxError("poetx: SkewMuon's nesterov=True needs momentum above 0")
