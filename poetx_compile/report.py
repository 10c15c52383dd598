"""The account of a model's parameters: what is rotated, what is not and why, and the bytes before and after."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from . import conversion, initial
from ._torch.optimizers import live_optimizers
from ._torch.parameters import own_grad
from .config import PoetxConfig
from .factor import OrthogonalFactor
from .kernels import HALF
from .ladder import Chosen
from .passes import all_names, is_named
from .registry import factors

_ASSUMED_STATES = 2
_WIDTH = 140


@dataclass(frozen=True)
class Bytes:
    """What training keeps for a parameter, in bytes."""

    weights: int = 0
    residuals: int = 0
    gradients: int = 0
    states: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.residuals + self.gradients + self.states

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        converted: whether it is rotated.
        how: the route (``gram``, ``dense``) and block sizes of a converted weight; else why it is not.
        before: bytes of ordinary training with the same optimizer.
        after: bytes of training as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    converted: bool
    how: str
    before: Bytes
    after: Bytes

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, repr=False)
class Report:
    """All parameters of a model, each exactly once, in the order of ``model.named_parameters()``.

    Attributes:
        rows: one for each parameter.
        states_known: whether the states of its optimizer were seen; before the first step two for each number are assumed.
        chosen: what the option ``memory`` chose, with its estimate; None without it.
        unmatched: patterns of the option ``exclude`` that fit no name of a parameter.
    """

    rows: tuple[Row, ...]
    states_known: bool
    chosen: Chosen | None = None
    unmatched: tuple[str, ...] = ()

    @property
    def before(self) -> Bytes:
        return sum((row.before for row in self.rows), Bytes())

    @property
    def after(self) -> Bytes:
        return sum((row.after for row in self.rows), Bytes())

    @property
    def coverage(self) -> float:
        """The share of all numbers that sit in converted weights."""
        return sum(row.numel for row in self.rows if row.converted) / max(sum(row.numel for row in self.rows), 1)

    def print(self, console: Console | None = None) -> None:
        """Write both tables; layers that differ only in their number share a line."""
        console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
        console.print(self._parameters(), self._totals())
        if self.chosen is not None:
            console.print(str(self.chosen), highlight=False)
        if self.unmatched:
            console.print(
                f"exclude: no parameter is named {', '.join(map(repr, self.unmatched))}", highlight=False, markup=False
            )

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(width=_WIDTH, file=text))
        return text.getvalue()

    def __repr__(self) -> str:
        return f"<Report: {len(self.rows)} parameters, {self.coverage:.1%} of their numbers rotated>"

    def _parameters(self) -> Table:
        table = Table(title=f"poetx: {self.coverage:.1%} of all parameters are rotated", title_justify="left")
        for heading in ("parameter", "shape", "dtype", "trained as"):
            table.add_column(heading, overflow="fold")
        for heading in ("before", "after"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row, count in _collapse(self.rows):
            name = f"{row.name}  × {count}" if count > 1 else row.name
            shape = " × ".join(map(str, row.shape))
            before, after = (_readable(count * part.total) for part in (row.before, row.after))
            table.add_row(name, shape, str(row.dtype).removeprefix("torch."), row.how, before, after)
        return table

    def _totals(self) -> Table:
        note = "" if self.states_known else f" (assuming {_ASSUMED_STATES} optimizer states until the first step)"
        table = Table(title=f"bytes{note}", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="right")
        before, after = self.before, self.after
        for name in ("weights", "residuals", "gradients", "states", "total"):
            sizes = (_readable(getattr(part, name)) for part in (before, after))
            table.add_row(name, *sizes, end_section=name == "states")
        return table


def build_report(model: nn.Module) -> Report:
    """Account for every parameter of a module. Looks at all live optimizers."""
    owners = {
        id(parameter): optimizer
        for optimizer in live_optimizers()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    known = any(owners[id(parameter)].state.get(parameter) for parameter in model.parameters() if id(parameter) in owners)
    rows = [_row(name, parameter, owners.get(id(parameter)), known) for name, parameter in model.named_parameters()]
    configs = [factor.config for factor in factors.of_module(model)]
    chosen = next((config for config in configs if isinstance(config, Chosen)), None)
    return Report(tuple(rows), known, chosen, _unmatched(model, configs))


def _unmatched(model: nn.Module, configs: Iterable[PoetxConfig]) -> tuple[str, ...]:
    """Patterns of ``exclude`` that fit no name, neither whole nor from any of its modules on, which may be compiled alone."""
    patterns = dict.fromkeys(pattern for config in configs for pattern in config.exclude)
    if not patterns:
        return ()
    whole = [name.split(".") for name, _ in all_names(model)]
    names = {".".join(parts[start:]) for parts in whole for start in range(len(parts))}
    return tuple(pattern for pattern in patterns if not any(is_named(name, (pattern,)) for name in names))


def _row(name: str, parameter: nn.Parameter, owner: Optimizer | None, known: bool) -> Row:
    factor = factors.of_weight(parameter)
    trained = parameter.requires_grad
    q = parameter if factor is None else factor.q
    entry = owner.state.get(parameter, {}) if owner is not None else {}
    held = [value for key, value in entry.items() if torch.is_tensor(value) and value.ndim and not key.startswith("poetx_")]
    like_q = sum(value.shape == q.shape for value in held) if known else _ASSUMED_STATES * trained
    ordinary = Bytes(_size(parameter), 0, trained * _size(parameter), like_q * _size(parameter))
    if factor is None:
        reason = conversion.skip_reason(parameter)
        how = f"ordinary: {reason.value if reason else 'in no compiled graph yet'}"
        states = sum(map(_size, held)) if known else ordinary.states
        grad = own_grad(parameter)
        after = Bytes(ordinary.weights, 0, ordinary.gradients if grad is None else _size(grad), states)
        return Row(name, tuple(parameter.shape), parameter.dtype, False, how, ordinary, after)
    states = sum(map(_size, held)) if known else like_q * _size(q)
    numbers, beside = _stored(factor)
    after = Bytes(numbers, beside, _size(q), _size(q) + states)
    return Row(name, tuple(parameter.shape), parameter.dtype, True, _how(factor), ordinary, after)


def _stored(factor: OrthogonalFactor) -> tuple[int, int]:
    """Bytes of the weight's numbers, and of what stands beside them."""
    base = factor.base
    if base is None:
        return _size(factor.weight), _size(factor.residual)
    return base.number_bytes, base.nbytes - base.number_bytes


def _how(factor: OrthogonalFactor) -> str:
    sides = (f"{side.count}×{side.width}" if side.count else "fixed" for side in (factor.rows, factor.columns))
    each = f"{factor.stack.count} matrices, " if factor.stack.count > 1 else ""
    return f"rotation: {factor.route}, {each}blocks {', '.join(sides)}{_rounding(factor)}{_start(factor)}"


def _start(factor: OrthogonalFactor) -> str:
    if factor.config.init == "keep":
        return ""
    return ", rows normalised at the start" if initial.was_rescaled(factor.weight) else ", start kept"


def _rounding(factor: OrthogonalFactor) -> str:
    bits, asked = factor.config.residual_bits, factor.config.storage
    if factor.storage != "folded":
        return f", {factor.storage}"
    if asked != "folded":
        why = (
            "not a contiguous matrix that serves as a product's weight alone"
            if factor.weight.dtype in HALF
            else "not in half precision"
        )
        return f", folded: {why}"
    if bits == 8 or factor.weight.dtype not in HALF:
        return ""
    return f", {bits} more bits" if bits else ", rounded stochastically"


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _collapse(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Rows that differ only in the numbers within their names, as one with a count, where the first stood."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{row.name}")[1:]
        groups.setdefault((pattern, row.shape, row.dtype, row.how), []).append(row)
    return [
        (replace(group[0], name=str(key[0])) if len(group) > 1 else group[0], len(group)) for key, group in groups.items()
    ]


def _readable(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
