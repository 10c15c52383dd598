"""Which route makes the gradient of each rotation."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..config import PoetxConfig
from .match import LinearMatch


def choose_route(match: LinearMatch, config: PoetxConfig) -> str:
    """``gram`` where it may and costs fewer flops than ``dense``, or where weights are stored lean.

    For ``N`` rows of input through an ``m × n`` weight, beyond what both routes do, Gram matrices of activations take
    ``2N(m·b_m + n·b_n)``; the dense route takes ``2Nmn`` for ``dW`` and ``2mn(b_m + b_n)`` for its projection.
    """
    if not match.uses or config.route == "dense":
        return "dense"
    if config.route == "gram" or config.storage != "folded":
        return "gram"
    stack = match.stack
    _, m, n = stack.shape
    tokens = sum(_tokens(use) for use in match.uses)
    gram = tokens * (m * stack.rows.width + n * stack.columns.width)
    dense = tokens * m * n + m * n * (stack.rows.width + stack.columns.width)
    return "gram" if gram <= dense else "dense"


def _tokens(use: fx.Node) -> int:
    """Rows of the output of a product; its hint where the batch is symbolic."""
    shape: Any = getattr(use.meta.get("example_value"), "shape", (1,))
    rows = 1
    for size in shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint or 1
    return rows
