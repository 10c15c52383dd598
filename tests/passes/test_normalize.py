"""Every spelling of a linear layer becomes ``F.linear(x, W, c)``, ``matmul(x, W)`` or ``addmm(c, x, W)``."""

from __future__ import annotations

import pytest
import torch
from graphs import Captured, capture, spelled
from spellings import CANONICAL, INPUTS, OTHER, OUTPUTS, Spelling
from torch import Tensor, nn

from poetx_compile.passes.normalize import ADDMM, LINEAR, MATMUL

PLACES = {LINEAR: 1, MATMUL: 1, ADDMM: 2}


def products(captured: Captured, weight: nn.Parameter) -> list[object]:
    """The canonical products of a weight."""
    return [
        node.target
        for node in captured.placeholder(weight).users
        if node.target in PLACES and node.args[PLACES[node.target]] is captured.placeholder(weight)
    ]


@pytest.mark.parametrize("spelling", CANONICAL, ids=str)
def test_every_use_becomes_canonical(spelling: Spelling) -> None:
    layer, captured = spelled(spelling)
    captured.normalized()
    assert len(products(captured, layer.weight)) == spelling.uses


@pytest.mark.parametrize("spelling", [s for s in CANONICAL if s.transposed], ids=str)
def test_weight_stored_inputs_by_outputs_keeps_its_form(spelling: Spelling) -> None:
    layer, captured = spelled(spelling)
    captured.normalized()
    assert products(captured, layer.weight) in ([MATMUL], [ADDMM])


@pytest.mark.parametrize("spelling", [s for s in CANONICAL if not s.transposed and s.uses == 1], ids=str)
def test_transposition_melts_into_the_product(spelling: Spelling) -> None:
    layer, captured = spelled(spelling)
    captured.normalized()
    assert products(captured, layer.weight) == [LINEAR]
    assert not {"t", "transpose", "permute", getattr, torch.t} & set(captured.targets)


@pytest.mark.parametrize("spelling", CANONICAL + OTHER, ids=str)
def test_numbers_stay_the_same_bit_for_bit(spelling: Spelling) -> None:
    _, captured = spelled(spelling)
    before = captured()
    assert torch.equal(captured.normalized()(), before)


@pytest.mark.parametrize("shape", [(INPUTS,), (3, INPUTS), (2, 3, INPUTS), (2, 1, 3, INPUTS), (0, INPUTS)], ids=str)
@pytest.mark.parametrize("name", ["F.linear by keyword", "x @ W.t()", "x @ W"])
def test_any_number_of_batch_dimensions(name: str, shape: tuple[int, ...]) -> None:
    spelling = next(s for s in CANONICAL if s.name == name)
    _, captured = spelled(spelling, *shape)
    before = captured()
    assert torch.equal(captured.normalized()(), before)


@pytest.mark.parametrize("spelling", CANONICAL, ids=str)
def test_a_second_run_changes_nothing(spelling: Spelling) -> None:
    captured = spelled(spelling)[1].normalized()
    once = captured.gm.code
    assert captured.normalized().gm.code == once


@pytest.mark.parametrize(
    "name", ["einsum", "W @ x", "sliced", "addmm with beta", "addmm with alpha", "broadcast bias", "cast"]
)
def test_what_is_no_plain_linear_is_left_as_it_is(name: str) -> None:
    spelling = next(s for s in OTHER if s.name == name)
    _, captured = spelled(spelling)
    before = captured.gm.code
    assert captured.normalized().gm.code == before


def test_products_of_activations_are_left_as_they_are() -> None:
    captured = capture(lambda x, y: x @ y.t() + torch.mm(x, y.transpose(0, 1)), torch.randn(5, 8), torch.randn(5, 8))
    before = captured.gm.code
    assert captured.normalized().gm.code == before


def test_products_of_parameters_are_left_as_they_are() -> None:
    a, b = (nn.Parameter(torch.randn(48, 48)) for _ in range(2))
    captured = capture(lambda x: x + a @ b.t() + torch.mm(a, b) + torch.addmm(a[0], a, b.t()), torch.randn(48, 48))
    before = captured.gm.code
    assert captured.normalized().gm.code == before


def test_one_transposition_of_many_uses() -> None:
    weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS))

    def function(x: Tensor, y: Tensor) -> Tensor:
        transposed = weight.t()
        return x @ transposed + torch.mm(y, transposed)

    captured = capture(function, torch.randn(5, INPUTS), torch.randn(5, INPUTS))
    before = captured()
    assert products(captured.normalized(), weight) == [LINEAR, LINEAR]
    assert "t" not in captured.targets
    assert torch.equal(captured(), before)


def test_a_transposition_that_something_else_needs_stays() -> None:
    weight = nn.Parameter(torch.randn(OUTPUTS, INPUTS))

    def function(x: Tensor) -> Tensor:
        transposed = weight.t()
        return x @ transposed + transposed.sum()

    captured = capture(function, torch.randn(5, INPUTS)).normalized()
    assert products(captured, weight) == [LINEAR]
    assert "t" in captured.targets


def test_layers_within_layers() -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 32), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(32, 24))))
    captured = capture(model, torch.randn(5, INPUTS)).normalized()
    assert captured.targets.count(LINEAR) == 2
