"""The rotated op stands where canonical products stood, and computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import CONFIG, Captured, capture, spelled
from spellings import CANONICAL, CHECKPOINTED, INPUTS, OTHER, Spelling
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import rotated_linear
from poetx_compile.passes import rewrite


def rewritten(captured: Captured) -> tuple[Captured, dict[str, OrthogonalFactor], list[Tensor]]:
    """Normalise, match, and take the Gram route wherever it may go; no weight is converted."""
    matches, _ = captured.normalized().matched()
    gram = [found for found in matches.values() if found.uses]
    made = {found.name: OrthogonalFactor(found.weight, found.name, CONFIG) for found in gram}
    extra = rewrite(captured.gm, [(found, made[found.name]) for found in gram]).tensors
    return captured, made, extra


def rotated(captured: Captured) -> int:
    """How many rotated ops stand in a graph and in its checkpointed regions."""
    graphs = [module.graph for module in captured.gm.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum(node.target is rotated_linear for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize("spelling", CANONICAL + CHECKPOINTED, ids=str)
def test_all_canonical_products_are_replaced(spelling: Spelling) -> None:
    captured, _, _ = rewritten(spelled(spelling)[1])
    assert rotated(captured) == spelling.uses


@pytest.mark.parametrize("spelling", OTHER, ids=str)
def test_other_products_are_left_as_they_are(spelling: Spelling) -> None:
    captured = spelled(spelling)[1].normalized()
    before = captured.gm.code
    _, made, extra = rewritten(captured)
    assert (captured.gm.code, made, extra) == (before, {}, [])


@pytest.mark.parametrize("spelling", CANONICAL + CHECKPOINTED, ids=str)
def test_outputs_stay_the_same_bit_for_bit(spelling: Spelling) -> None:
    _, captured = spelled(spelling)
    before = captured()
    _, _, extra = rewritten(captured)
    assert torch.equal(captured(*extra), before)


@pytest.mark.parametrize("shape", [(INPUTS,), (2, 3, INPUTS), (2, 1, 3, INPUTS), (0, INPUTS)], ids=str)
@pytest.mark.parametrize("name", ["F.linear by keyword", "x @ W.t()", "x @ W"])
def test_any_number_of_batch_dimensions(name: str, shape: tuple[int, ...]) -> None:
    _, captured = spelled(next(s for s in CANONICAL if s.name == name), *shape)
    before = captured()
    _, _, extra = rewritten(captured)
    assert torch.equal(captured(*extra), before)


def test_inputs_are_appended_weight_by_weight() -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, 24, bias=False))
    captured = capture(model, torch.randn(5, INPUTS))
    before = list(captured.inputs)
    _, made, extra = rewritten(captured)
    placeholders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    assert placeholders[: len(before)] == before
    assert len(placeholders) == len(before) + len(extra)
    expected = [tensor for factor in made.values() for tensor in factor.inputs.values()]
    assert all(given is wanted for given, wanted in zip(extra, expected, strict=True))
    assert [node.meta["example_value"].shape for node in placeholders[len(before) :]] == [tensor.shape for tensor in extra]


def test_all_uses_of_a_weight_share_its_factor() -> None:
    layer = nn.Linear(INPUTS, INPUTS)
    captured, made, extra = rewritten(
        capture(lambda x: layer(torch.tanh(layer(x))) + x @ layer.weight, torch.randn(5, INPUTS))
    )
    assert rotated(captured) == 3
    assert len(extra) == 3 * len(made) == 3
    nodes = [node for node in captured.gm.graph.nodes if node.target is rotated_linear]
    assert len({node.args[3:6] for node in nodes}) == 1
    assert [node.args[9] for node in nodes] == [False, False, True]


def test_biases_keep_their_place() -> None:
    def function(x: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(x, weight, bias) + torch.addmm(bias, x, other)

    weight, other = (nn.Parameter(torch.randn(48, 48)) for _ in range(2))
    bias = nn.Parameter(torch.randn(48))
    captured, _, _ = rewritten(capture(function, torch.randn(5, 48)))
    held = captured.placeholder(bias)
    assert [node.args[2] for node in captured.gm.graph.nodes if node.target is rotated_linear] == [None, held, held]


@pytest.mark.parametrize("nest", [lambda layer: layer, lambda layer: nn.Sequential(nn.Identity(), nn.Sequential(layer))])
def test_nested_modules(nest: Callable[[nn.Module], nn.Module]) -> None:
    captured, made, _ = rewritten(capture(nest(nn.Linear(INPUTS, 32)), torch.randn(5, INPUTS)))
    assert rotated(captured) == len(made) == 1


class Checkpointed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("layer", [nn.Linear, Checkpointed])
def test_the_graph_that_was_captured_stays_as_it_is(layer: type[nn.Linear]) -> None:
    """Dynamo walks its own graph again after the backend returns: only the copy is edited."""
    seen: list[tuple[str, str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        from poetx_compile.backend import poetx

        before = gm.print_readable(print_output=False)
        compiled = poetx(gm, inputs, options={"inner": "aot_eager", "block_size": 16})
        seen.append((before, gm.print_readable(print_output=False)))
        return compiled

    torch.compile(layer(INPUTS, 32), backend=backend)(torch.randn(5, INPUTS))
    ((before, after),) = seen
    assert before == after
