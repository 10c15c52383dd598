"""The checker that users run on their own models: it passes what is right, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Experts, network
from hypothesis import given, settings
from oracle import explicit_weight as oracle_weight
from strategies import KINDS, SEEDS, OwningFactor, factors, normal
from torch import Tensor, nn
from zoo import ZOO, Toy

from poetx_compile import factor as factor_module
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.registry import factors as registry
from poetx_compile.testing import check, check_equivalence, explicit_weight
from poetx_compile.testing.blocks import LEAVES, Leaf
from poetx_compile.testing.strategies import models

OPTIONS: dict[str, Any] = {"block_size": 8, "chunk": 4, "include_conv": True}


@pytest.mark.filterwarnings("ignore:.*of which no weight is rotated")
@settings(max_examples=12)
@given(models())
def test_random_models(drawn: tuple[nn.Module, Tensor]) -> None:
    check_equivalence(*drawn, options=OPTIONS)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_rotated(leaf: Leaf) -> None:
    found = check_equivalence(leaf(20, 24, True).double(), torch.randn(6, 20, dtype=torch.float64), options=OPTIONS)
    assert found.coverage > 0.5


@pytest.mark.parametrize("toy", [toy for toy in ZOO if toy.name in ("nanoGPT", "nn.Transformer", "Mixtral")], ids=str)
def test_models_of_the_zoo(toy: Toy) -> None:
    model = toy.model() if toy.name == "Mixtral" else toy.model().double()  # torch groups no products in float64
    found = check_equivalence(model, loss=toy.loss, options=OPTIONS | toy.options, **toy.inputs())
    assert found.coverage > 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(8, 22, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert check_equivalence(network(dtype), x, options=OPTIONS).coverage > 0.8


def test_the_model_itself_stays_as_it_was() -> None:
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    check_equivalence(model, torch.randn(8, 22, dtype=torch.float64), options=OPTIONS)
    assert not any(registry.of_weight(parameter) for parameter in model.parameters())
    for old, parameter in zip(before, model.parameters()):
        assert torch.equal(old, parameter)
        assert parameter.grad is None


def test_a_parameter_that_never_learns_is_no_difference() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    check_equivalence(model, torch.randn(8, 22, dtype=torch.float64), options=OPTIONS)


@given(factors(kinds=KINDS), SEEDS)
def test_the_explicit_weight_is_that_of_the_oracle(factor: OwningFactor, seed: int) -> None:
    q = normal(factor.q.numel(), seed=seed)
    weight = factor.weight.detach()
    torch.testing.assert_close(explicit_weight(factor, weight, q), oracle_weight(factor, weight, q), rtol=1e-10, atol=1e-10)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


def doubled(self: OrthogonalFactor, gradient: Tensor, project: Any = OrthogonalFactor.project) -> Tensor:
    return 2 * project(self, gradient)


def half_a_report(model: nn.Module, *, show: bool, report: Any = check.report) -> Any:
    found = report(model, show=show)
    return replace(found, rows=found.rows[1:])


def all_ordinary(model: nn.Module, *, show: bool, report: Any = check.report) -> Any:
    found = report(model, show=show)
    return replace(found, rows=tuple(replace(row, converted=False) for row in found.rows))


class TestMistakesAreFound:
    @staticmethod
    def check(model: nn.Module | None = None, **keywords: Any) -> None:
        check_equivalence(model or Experts(), torch.randn(8, 22, dtype=torch.float64), options=OPTIONS, **keywords)

    def test_none(self) -> None:
        self.check()

    def test_in_the_outputs(self) -> None:
        with pytest.raises(AssertionError, match=r"output or input gradient 0 differs by \d"):
            self.check(Noisy(22, 20).double())

    def test_in_the_gradient_of_a_rotation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OrthogonalFactor, "project", doubled)
        with pytest.raises(AssertionError, match=r"the gradient of 'experts' differs by 1\.0e\+00 of its size"):
            self.check()

    def test_in_the_gradient_of_an_ordinary_parameter(self) -> None:
        class Hooked(nn.Linear):
            def __deepcopy__(self, memo: Any) -> Hooked:
                copy = Hooked(22, 20).double()
                copy.load_state_dict(self.state_dict())
                copies.append(copy)
                if len(copies) == 2:
                    copy.bias.register_hook(lambda gradient: gradient * 1.5)
                return copy

        copies: list[nn.Module] = []
        with pytest.raises(AssertionError, match=r"the gradient of 'bias' differs by 5\.0e-01"):
            self.check(Hooked(22, 20).double())

    def test_in_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(factor_module.kernels, "rotate_all_", lambda turns: None)
        with pytest.raises(AssertionError, match="'experts' after one step differs"):
            self.check()

    @pytest.mark.parametrize(
        ("report", "message"),
        [(half_a_report, "does not list every parameter"), (all_ordinary, "says of 'experts' that it is rotation")],
    )
    def test_in_the_report(self, report: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check, "report", report)
        with pytest.raises(AssertionError, match=message):
            self.check()

    def test_a_model_whose_output_has_no_gradient(self) -> None:
        with pytest.raises(AssertionError, match="give a loss"):
            self.check(Detached(22, 20).double())


def test_hypothesis_is_needed_for_random_models_only() -> None:
    script = """
import sys
sys.modules["hypothesis"] = None
from poetx_compile.testing import check_equivalence
try:
    import poetx_compile.testing.strategies
except ImportError as error:
    assert "hypothesis" in str(error)
else:
    raise AssertionError("not needed at all")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
