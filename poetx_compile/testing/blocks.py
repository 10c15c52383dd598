"""What random models are made of: small modules from ``[batch, inputs]`` to ``[batch, outputs]``, each with one difficulty."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._torch.compilers import graph_break


class Activated(nn.Module):
    """A linear layer and a smooth activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Overwritten(nn.Module):
    """A linear layer whose outputs an activation overwrites."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.linear(x), inplace=True)


class Spelled(nn.Module):
    """A linear layer written out, with its weight stored ``[inputs, outputs]``."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Experts(nn.Module):
    """A mixture of experts in one stack of weights."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, 3, bias=bias)
        self.experts = nn.Parameter(torch.randn(3, inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,beo->bo", self.gate(x).softmax(-1), torch.einsum("bi,eio->beo", x, self.experts))


class Convolved(nn.Module):
    """A convolution along the features, then a linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 4, 3, padding=1, bias=bias)
        self.linear = nn.Linear(4 * inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convolution(x[:, None]).flatten(1))


class Attending(nn.Module):
    """Self-attention over the batch, with packed projections, then a linear layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(inputs, 1, bias=bias)
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.attention(x, x, x, need_weights=False)[0])


class WeightNormed(nn.Module):
    """A linear layer under weight norm."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Recurrent(nn.Module):
    """A recurrent cell, unrolled for two steps."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.cos(), self.cell(x))


class Around(nn.Module):
    """A module that runs another one in its own way."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Residual(Around):
    """Adds its input where shapes allow it, after a norm."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(F.layer_norm(x, x.shape[-1:]))
        return x + y if x.shape == y.shape else y


class Shared(Around):
    """Uses the same weights twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.inner(x.cos())


class Broken(Around):
    """Breaks the graph before and after."""

    def forward(self, x: Tensor) -> Tensor:
        graph_break()
        y: Tensor = self.inner(x)
        graph_break()
        return y.sin()


class Branching(Around):
    """Decides by its data, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x).cos()


class Cast(Around):
    """Runs under autocast; float64 stays as it is there."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y: Tensor = self.inner(x)
        return y.to(x.dtype)


class Checkpointed(Around):
    """Runs again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


Leaf = Callable[[int, int, bool], nn.Module]

LEAVES: tuple[Leaf, ...] = (Activated, Overwritten, Spelled, Experts, Convolved, Attending, WeightNormed, Recurrent)
AROUND: tuple[Callable[[nn.Module], nn.Module], ...] = (Residual, Shared, Broken, Branching, Cast, Checkpointed)
