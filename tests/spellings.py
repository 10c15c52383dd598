"""Ways to write a linear layer: what the passes must see through, and what the backend must train right."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import map as control_map
from torch._higher_order_ops import scan
from torch.utils.checkpoint import checkpoint

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

INPUTS, OUTPUTS = 40, 48


@dataclass(frozen=True)
class Spelling:
    """``product(x, W, c)``, with ``W`` stored ``[outputs, inputs]``, or ``[inputs, outputs]`` where ``transposed``."""

    name: str
    product: Product
    transposed: bool = False
    uses: int = 1

    def layer(self, inputs: int = INPUTS, outputs: int = OUTPUTS, dtype: torch.dtype = torch.float64) -> Spelled:
        return Spelled(self.product, (inputs, outputs) if self.transposed else (outputs, inputs), outputs, dtype)

    def __str__(self) -> str:
        return self.name


class Spelled(nn.Module):
    """A layer that is nothing but its parameters and one way to multiply."""

    def __init__(self, product: Product, shape: tuple[int, int], outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype) / shape[1] ** 0.5)
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


checkpointed = partial(checkpoint, use_reentrant=False)


def _mapped(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return torch.vmap(partial(F.linear, weight=w, bias=c))(x)


def _in_pieces(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> Product:
    return lambda x, w, c: torch.cat([F.linear(x, piece) for piece in cut(w)], dim=-1)


def _without_first(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


CANONICAL = [
    Spelling("F.linear", lambda x, w, c: F.linear(x, w, c)),
    Spelling("F.linear without bias", lambda x, w, c: F.linear(x, w)),
    Spelling("F.linear by keyword", lambda x, w, c: F.linear(bias=c, weight=w, input=x)),
    Spelling("x @ W.t()", lambda x, w, c: x @ w.t() + c),
    Spelling("x @ W.T", lambda x, w, c: x @ w.T),
    Spelling("x @ W.mT", lambda x, w, c: x @ w.mT),
    Spelling("x @ W.H", lambda x, w, c: x @ w.H),
    Spelling("x @ W.adjoint()", lambda x, w, c: x @ w.adjoint()),
    Spelling("x @ W.transpose(0, 1)", lambda x, w, c: x @ w.transpose(0, 1)),
    Spelling("x @ W.transpose(-1, -2)", lambda x, w, c: x @ w.transpose(-1, -2)),
    Spelling("x @ W.swapaxes(0, 1)", lambda x, w, c: x @ w.swapaxes(0, 1)),
    Spelling("x @ W.permute(1, 0)", lambda x, w, c: x @ w.permute(1, 0)),
    Spelling("x @ W.permute((1, 0))", lambda x, w, c: x @ w.permute((1, 0))),
    Spelling("x @ torch.t(W)", lambda x, w, c: x @ torch.t(w)),
    Spelling("x @ torch.transpose(W, 0, 1)", lambda x, w, c: x @ torch.transpose(w, 0, 1)),
    Spelling("torch.matmul(x, W.t())", lambda x, w, c: torch.matmul(x, w.t())),
    Spelling("torch.linalg.matmul(x, W.t())", lambda x, w, c: torch.linalg.matmul(x, w.t())),
    Spelling("x.matmul(W.t())", lambda x, w, c: x.matmul(w.t())),
    Spelling("W.t().__rmatmul__(x)", lambda x, w, c: w.t().__rmatmul__(x)),
    Spelling("torch.mm(x, W.t())", lambda x, w, c: torch.mm(x, w.t())),
    Spelling("torch.mm by keyword", lambda x, w, c: torch.mm(mat2=w.t(), input=x)),
    Spelling("x.mm(W.t())", lambda x, w, c: x.mm(w.t())),
    Spelling("torch.addmm(c, x, W.t())", lambda x, w, c: torch.addmm(c, x, w.t())),
    Spelling("torch.addmm by keyword", lambda x, w, c: torch.addmm(mat2=w.t(), mat1=x, input=c)),
    Spelling("c.addmm(x, W.t())", lambda x, w, c: c.addmm(x, w.t())),
    Spelling("x @ W", lambda x, w, c: x @ w + c, transposed=True),
    Spelling("x.matmul(W)", lambda x, w, c: x.matmul(w), transposed=True),
    Spelling("torch.mm(x, W)", lambda x, w, c: torch.mm(x, w), transposed=True),
    Spelling("torch.addmm(c, x, W)", lambda x, w, c: torch.addmm(c, x, w), transposed=True),
    Spelling("c.addmm(x, W)", lambda x, w, c: c.addmm(x, w), transposed=True),
    Spelling("used twice in one form", lambda x, w, c: F.linear(x, w, c) * F.linear(x.cos(), w), uses=2),
    Spelling("used twice in two canonical forms", lambda x, w, c: F.linear(x, w, c) * F.linear(x @ w.t() @ w, w), uses=4),
    Spelling("x cast to the dtype of W", lambda x, w, c: F.linear(x.type_as(w).to(w), w, c)),
    Spelling("activated in place", lambda x, w, c: F.silu(F.linear(x, w, c), inplace=True)),
    Spelling("added to in place", lambda x, w, c: operator.iadd(x @ w.t(), c)),
    Spelling("overwritten in part", lambda x, w, c: _without_first(F.linear(x, w, c))),
    Spelling("overwritten through a view", lambda x, w, c: _without_first(F.linear(x, w, c)[:])),
    Spelling("overwritten, addmm", lambda x, w, c: torch.addmm(c, x, w).mul_(2), transposed=True),
]
"""What takes the Gram route."""

CHECKPOINTED = [
    Spelling("checkpointed", lambda x, w, c: checkpointed(F.linear, x, w, c)),
    Spelling("checkpointed, x @ W.t()", lambda x, w, c: checkpointed(lambda x, w, c: x.cos() @ w.t() + c, x, w, c)),
    Spelling("checkpointed, addmm", lambda x, w, c: checkpointed(lambda x, w, c: c.addmm(x, w), x, w, c), transposed=True),
    Spelling("checkpointed twice", lambda x, w, c: checkpointed(partial(checkpointed, F.linear), x, w, c)),
    Spelling("checkpointed and overwritten", lambda x, w, c: checkpointed(F.linear, x, w, c).mul_(x[0, 0])),
    Spelling("checkpointed, overwritten within", lambda x, w, c: checkpointed(lambda *of: F.linear(*of).tanh_(), x, w, c)),
    Spelling("checkpointed and not", lambda x, w, c: checkpointed(F.linear, x, w, c) * F.linear(x.cos(), w), uses=2),
]
"""What takes the Gram route within regions that run again in the backward pass."""

OTHER = [
    Spelling("einsum", lambda x, w, c: torch.einsum("ni,oi->no", x, w)),
    Spelling("bmm with expanded weight", lambda x, w, c: torch.bmm(x[None], w.t().expand(1, -1, -1))[0]),
    Spelling("W @ x", lambda x, w, c: (w @ x.t()).t()),
    Spelling("sliced", _in_pieces(lambda w: (w[:7], w[7:]))),
    Spelling("chunked", _in_pieces(lambda w: w.chunk(3))),
    Spelling("split", _in_pieces(lambda w: w.split((8, w.shape[0] - 8)))),
    Spelling("concatenated", lambda x, w, c: F.linear(x, torch.cat([w[:7], w[7:]]), torch.cat([c[:7], c[7:]]))),
    Spelling("reshaped", lambda x, w, c: F.linear(x, w.reshape(-1).view(w.shape), c)),
    Spelling("cast", lambda x, w, c: F.linear(x, w.to(torch.float64), c)),
    Spelling("transposed three times", lambda x, w, c: x @ w.t().t().t()),
    Spelling("transposed by keyword", lambda x, w, c: x @ w.transpose(dim0=0, dim1=1)),
    Spelling("addmm with beta", lambda x, w, c: torch.addmm(c, x, w.t(), beta=0.5)),
    Spelling("addmm with alpha", lambda x, w, c: torch.addmm(c, x, w.t(), alpha=2.0)),
    Spelling("broadcast bias", lambda x, w, c: F.linear(x, w, c[:1])),
    Spelling("bias in two dimensions", lambda x, w, c: torch.addmm(c.expand(x.shape[0], -1), x, w.t())),
    Spelling("checkpointed slices", lambda x, w, c: checkpointed(_in_pieces(lambda w: w.chunk(2)), x, w, c)),
    Spelling("checkpointed, and in another form", lambda x, w, c: checkpointed(F.linear, x, w, c) + F.linear(x, w[:1])),
    Spelling("checkpointed under vmap", lambda x, w, c: checkpointed(lambda *of: _mapped(*of), x, w, c)),
    Spelling("under vmap", lambda x, w, c: _mapped(x, w, c)),
    Spelling("under grad", lambda x, w, c: torch.func.grad(lambda t: F.linear(t, w, c).pow(3).sum())(x)),
    Spelling("under cond", lambda x, w, c: torch.cond(x.sum() > 0, lambda t: F.linear(t, w, c), lambda t: t @ w.t(), (x,))),
    Spelling("under map", lambda x, w, c: control_map(lambda t: F.linear(t, w, c), x)),
    Spelling("under scan", lambda x, w, c: scan(lambda s, t: (s + F.linear(t, w, c), s.cos()), torch.zeros_like(c), x)[1]),
    Spelling("scaled", lambda x, w, c: F.linear(x, w * 0.5, c)),
    Spelling("scaled by a tensor", lambda x, w, c: F.linear(x, x.std() * w / c[0], c)),
    Spelling("normalised", lambda x, w, c: F.linear(x, torch._weight_norm(w, c[:, None], 0), c)),
    Spelling("used twice in different forms", lambda x, w, c: F.linear(x, w, c) * F.linear(x.cos(), w[:1])),
]
"""What is rotated all the same, by the dense route."""

TRAINABLE = [spelling for spelling in OTHER if spelling.name != "under scan" or torch.__version__ >= "2.13"]
"""Before torch 2.13 a scan over a product has no gradient, with any backend."""


@dataclass(frozen=True)
class Stack:
    """``product(x, W)`` with a weight that is read as ``matrices`` ``[count, m, n]``, for an input of shape ``x``."""

    name: str
    product: Callable[[Tensor, Tensor], Tensor]
    weight: tuple[int, ...]
    x: tuple[int, ...]
    matrices: tuple[int, int, int]

    def layer(self) -> StackLayer:
        return StackLayer(self)

    def __str__(self) -> str:
        return self.name


class StackLayer(nn.Module):
    """A layer that is nothing but a weight of three dimensions or more."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.product = stack.product
        self.weight = nn.Parameter(torch.randn(stack.weight, dtype=torch.float64) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


def _experts_in_turn(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(part, expert) for part, expert in zip(x, w)])


def _chosen_experts(x: Tensor, w: Tensor) -> Tensor:
    chosen = x[..., 0].argsort() % w.shape[0]
    return torch.bmm(x[:, None], w[chosen].mT)


STACKS = [
    Stack("torch.bmm", lambda x, w: torch.bmm(x, w), (3, 40, 17), (3, 5, 40), (3, 40, 17)),
    Stack("x @ W", lambda x, w: x @ w, (3, 40, 17), (3, 5, 40), (3, 40, 17)),
    Stack("x @ W.mT", lambda x, w: x @ w.mT, (3, 17, 40), (3, 5, 40), (3, 17, 40)),
    Stack("torch.baddbmm", lambda x, w: torch.baddbmm(x[..., :1], x, w), (3, 40, 17), (3, 5, 40), (3, 40, 17)),
    Stack("einsum of experts", lambda x, w: torch.einsum("ebd,edf->ebf", x, w), (3, 40, 17), (3, 5, 40), (3, 40, 17)),
    Stack("einsum of heads", lambda x, w: torch.einsum("bd,hdk->bhk", x, w), (3, 40, 17), (5, 40), (3, 40, 17)),
    Stack("two dimensions of experts", lambda x, w: x @ w, (2, 3, 40, 17), (2, 3, 5, 40), (6, 40, 17)),
    Stack("experts in turn", _experts_in_turn, (3, 17, 40), (3, 5, 40), (3, 17, 40)),
    Stack("chosen experts", _chosen_experts, (3, 17, 40), (5, 40), (3, 17, 40)),
    Stack("F.bilinear", lambda x, w: F.bilinear(x, x.cos(), w), (5, 33, 33), (4, 33), (5, 33, 33)),
]
"""What is rotated matrix by matrix, by the dense route."""

CONVOLUTIONS = [
    Stack("F.conv1d", lambda x, w: F.conv1d(x, w), (20, 6, 3), (2, 6, 9), (1, 20, 18)),
    Stack("F.conv2d", lambda x, w: F.conv2d(x, w, stride=2, padding=1), (20, 6, 3, 3), (2, 6, 9, 9), (1, 20, 54)),
    Stack("F.conv2d, same", lambda x, w: F.conv2d(x, weight=w, padding="same"), (20, 6, 3, 3), (2, 6, 9, 9), (1, 20, 54)),
    Stack("F.conv3d", lambda x, w: F.conv3d(x, w), (20, 3, 2, 2, 2), (2, 3, 4, 4, 4), (1, 20, 24)),
    Stack("F.conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, stride=2), (20, 6, 3, 3), (2, 20, 5, 5), (1, 20, 54)),
]
"""What is rotated as one flat matrix, by the dense route, where ``include_conv`` says so."""
