"""Ways to write a linear layer: what the passes must see through, and what the backend must train right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def _in_pieces(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> Product:
    return lambda x, w, c: torch.cat([F.linear(x, piece) for piece in cut(w)], dim=-1)


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
]
"""What takes the Gram route."""

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
    Spelling("checkpointed", lambda x, w, c: checkpoint(F.linear, x, w, c, use_reentrant=False)),
    Spelling("under vmap", lambda x, w, c: torch.vmap(partial(F.linear, weight=w, bias=c))(x)),
    Spelling("under grad", lambda x, w, c: torch.func.grad(lambda t: F.linear(t, w, c).pow(3).sum())(x)),
    Spelling("used twice in different forms", lambda x, w, c: F.linear(x, w, c) * F.linear(x.cos(), w[:1])),
]
"""What is rotated all the same, by the dense route."""
