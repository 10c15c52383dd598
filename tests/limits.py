"""What stays ordinary though one might wish otherwise, each with the words that the report gives the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poetx_compile.passes import SkipReason


@dataclass(frozen=True)
class Limit:
    """A model of which ``weight`` stays ordinary.

    Attributes:
        sentence: what the report says.
        whole: whether ``torch.compile`` compiles the model, rather than ``model.compile()``.
        before: the Python from which on it is rotated.
    """

    name: str
    make: Callable[[], nn.Module]
    weight: str
    sentence: str
    shape: tuple[int, ...] = (5, 32)
    whole: bool = True
    before: tuple[int, int] = (4, 0)

    def __str__(self) -> str:
        return self.name


class Wrapped(nn.Module):
    """A function of its input and of one parameter."""

    def __init__(self, function: Callable[[Tensor, nn.Parameter], Tensor], weight: nn.Parameter) -> None:
        super().__init__()
        self.function, self.weight = function, weight

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.t() @ x


class Special(nn.Parameter):
    """A parameter with behaviour of its own, as quantised and distributed ones have."""


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((48, 32), (48, 16), (16, 32)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _matrix(kind: type[nn.Parameter] = nn.Parameter) -> nn.Parameter:
    return kind(torch.randn(48, 32))


def _zeros() -> nn.Module:
    layer = nn.Linear(32, 48)
    nn.init.zeros_(layer.weight)
    return layer


def _normed_by_hooks() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(32, 48))


NOT_COMPILED = "in no compiled graph yet"
NOT_A_LINEAR = SkipReason.NOT_A_LINEAR.value

LIMITS = [
    Limit("a product inside a custom autograd function", lambda: Wrapped(Product.apply, _matrix()), "weight", NOT_A_LINEAR),
    Limit("recurrent layers, which Dynamo does not trace", Recurrent, "lstm.weight_ih_l0", NOT_COMPILED),
    Limit("a base with a low-rank update, as in DoRA", LowRank, "weight", NOT_A_LINEAR),
    Limit("torch.nn.utils.weight_norm", _normed_by_hooks, "weight_v", NOT_A_LINEAR),
    Limit(
        "parametrizations.orthogonal",
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(32, 48)),
        "parametrizations.weight.original",
        NOT_A_LINEAR,
    ),
    Limit(
        "a weight normalised by other means",
        lambda: Wrapped(lambda x, w: F.linear(x, F.normalize(w)), _matrix()),
        "weight",
        NOT_A_LINEAR,
    ),
    Limit(
        "a grouped convolution",
        lambda: nn.Conv1d(32, 32, 3, groups=2),
        "weight",
        SkipReason.GROUPED.value,
        (5, 32, 8),
    ),
    Limit(
        "a subclass of the parameter class", lambda: Wrapped(F.linear, _matrix(Special)), "weight", SkipReason.DTYPE.value
    ),
    Limit("a weight that starts at zero", _zeros, "weight", SkipReason.ZERO.value),
    Limit(
        "nn.Sequential(...).compile(), before Python 3.13",
        lambda: nn.Sequential(nn.Linear(32, 48)),
        "0.weight",
        NOT_COMPILED,
        whole=False,
        before=(3, 13),
    ),
]
