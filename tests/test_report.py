"""What the report says beside its rows: patterns that name nothing, and all names of a tied weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import OPTIONS, Block, network, rotating
from torch import Tensor, nn

from poetx_compile import prepare, report
from poetx_compile.passes import SkipReason

X = torch.ones(2, 22, dtype=torch.float64)


class Tied(nn.Module):
    """Three linear layers, two of them with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def trained_as(model: nn.Module) -> dict[str, str]:
    return {row.name: row.how for row in report(model, show=False).rows}


@pytest.mark.parametrize("name", ["first", "first.weight", "second", "second.weight", "sec*"])
def test_a_tied_weight_is_excluded_by_any_of_its_names(name: str) -> None:
    model = Tied()
    rotating(model, exclude=[name])(torch.ones(2, 32))
    found = trained_as(model)
    assert found["first.weight"] == f"ordinary: {SkipReason.EXCLUDED.value}"
    assert found["third.weight"].startswith("rotation")
    assert report(model, show=False).unmatched == ()


@pytest.mark.parametrize(
    ("patterns", "unmatched"),
    [
        ([], ()),
        (["2"], ()),
        (["2.*", "0.bias"], ()),
        (["nosuchlayer.*"], ("nosuchlayer.*",)),
        (["2.weight", "gate", "*.[a]"], ("gate", "*.[a]")),
    ],
)
def test_patterns_that_exclude_nothing_are_listed(patterns: list[str], unmatched: tuple[str, ...]) -> None:
    found = prepare(network(), X, options=OPTIONS | {"exclude": patterns})
    assert found.unmatched == unmatched
    for pattern in unmatched:
        assert f"'{pattern}'" in str(found).splitlines()[-1]
    assert ("exclude: no parameter is named" in str(found)) == bool(unmatched)


@pytest.mark.parametrize("in_place", [True, False])
def test_patterns_count_from_what_is_compiled(in_place: bool) -> None:
    model: Any = nn.ModuleList([Block(), Block()])
    options = OPTIONS | {"exclude": ["layers.2.*", "layer.2.*"]}
    for place, block in enumerate(model):
        if in_place:
            block.compile(backend="poetx", options=options)
        else:
            model[place] = torch.compile(block, backend="poetx", options=options)
        model[place](X)
    assert report(model, show=False).unmatched == ("layer.2.*",)


def test_default_heads_are_not_listed() -> None:
    model = network()
    rotating(model)(X)
    assert report(model, show=False).unmatched == ()
    assert "exclude" not in str(report(model, show=False))
