"""Put the rotated linear op in place of products whose weight takes the Gram route."""

from __future__ import annotations

from torch import Tensor, fx

from .._torch import add_input
from ..factor import OrthogonalFactor
from ..kernels import LINEAR_VERSION, rotated_linear
from .match import LinearMatch
from .normalize import ADDMM, LINEAR


def rewrite(gm: fx.GraphModule, converted: list[tuple[LinearMatch, OrthogonalFactor]]) -> list[Tensor]:
    """Replace every use of the given weights in ``gm`` itself.

    Legal because the op's forward is the product it replaces, bit for bit; only gradients differ.

    Returns:
        The values of the placeholders that were added, in order: each factor's ``inputs``.
    """
    extra: list[Tensor] = []
    for match, factor in converted:
        names = ("q", "rows", "columns")
        nodes = [
            add_input(gm, f"poetx_{label}_{match.placeholder.name}", tensor) for label, tensor in zip(names, factor.inputs)
        ]
        extra.extend(factor.inputs)
        for use in match.uses:
            _replace(gm, use, match.placeholder, nodes, factor)
    gm.graph.lint()
    gm.recompile()
    return extra


def _replace(gm: fx.GraphModule, use: fx.Node, weight: fx.Node, nodes: list[fx.Node], factor: OrthogonalFactor) -> None:
    bias, x = None, use.args[0]
    if use.target is ADDMM:
        bias, x = use.args[0], use.args[1]
    elif use.target is LINEAR and len(use.args) > 2:
        bias = use.args[2]
    widths = (factor.rows.width, factor.columns.width)
    settings = (*widths, factor.config.scale, use.target is not LINEAR, LINEAR_VERSION)
    runs = (factor.rows.run, factor.columns.run)
    with gm.graph.inserting_before(use):
        new = gm.graph.call_function(rotated_linear, (x, weight, bias, *nodes, *settings, *runs))
    new.meta = dict(use.meta)
    use.replace_all_uses_with(new)
    gm.graph.erase_node(use)
