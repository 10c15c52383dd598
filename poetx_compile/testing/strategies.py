"""Random models for Hypothesis (``pip install hypothesis``), with all that makes a compiler's life hard."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .blocks import AROUND, LEAVES


@st.composite
def models(draw: st.DrawFn, *, largest: int = 40, depth: int = 3) -> tuple[nn.Module, Tensor]:
    """A model in float64 and an input for it: ``check_equivalence(*draw(models()))``.

    Nested modules of odd sizes, some of which share weights, overwrite results, break the graph, branch on data, run under autocast
    or are checkpointed, beside attention, experts, convolutions, recurrent cells and weight norm.

    Args:
        largest: number of features.
        depth: how deep modules nest.
    """
    sizes = st.integers(2, largest)
    torch.manual_seed(draw(st.integers(0, 999)))
    inputs, outputs = draw(sizes), draw(sizes)
    model = draw(_modules(inputs, outputs, sizes, depth)).double()
    batch = draw(st.integers(2, 9))
    return model, torch.randn(batch, inputs, dtype=torch.float64, requires_grad=draw(st.booleans()))


@st.composite
def _modules(draw: st.DrawFn, inputs: int, outputs: int, sizes: st.SearchStrategy[int], depth: int) -> nn.Module:
    kind = draw(st.sampled_from(("leaf", "around", "sequence"))) if depth else "leaf"
    if kind == "leaf":
        return draw(st.sampled_from(LEAVES))(inputs, outputs, draw(st.booleans()))
    if kind == "around":
        return draw(st.sampled_from(AROUND))(draw(_modules(inputs, outputs, sizes, depth - 1)))
    between = draw(sizes)
    first = draw(_modules(inputs, between, sizes, depth - 1))
    return nn.Sequential(first, draw(_modules(between, outputs, sizes, depth - 1)))
