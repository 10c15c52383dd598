"""When a weight becomes a rotation, when it must stay what it is, and how it becomes ordinary again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import factor_of
from torch import Tensor, nn

from poetx_compile import PoetxConfig, PoetxError, conversion
from poetx_compile.passes import SkipReason
from poetx_compile.registry import factors

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "block_size": 16}
CONFIG = PoetxConfig(**OPTIONS)


def rotating(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS | options)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(32, 48))


class TestAdopt:
    def test_values_stay(self, weight: nn.Parameter) -> None:
        before = weight.detach().clone()
        conversion.adopt(weight, "fc.weight", CONFIG)
        assert torch.equal(weight, before)

    def test_one_factor_for_a_weight(self, weight: nn.Parameter) -> None:
        factor = conversion.adopt(weight, "fc.weight", CONFIG)
        assert conversion.adopt(weight, "elsewhere", CONFIG) is factor is factors.of_weight(weight)

    @pytest.mark.parametrize(
        ("field", "other"),
        [("block_size", 32), ("chunk", 4), ("scale", 0.5), ("seed", 1), ("permutation_period", 7), ("include_conv", True)],
    )
    @pytest.mark.filterwarnings("ignore:poetx. new permutations")
    def test_other_settings_are_refused(self, weight: nn.Parameter, field: str, other: float) -> None:
        conversion.adopt(weight, "fc.weight", CONFIG)
        with pytest.raises(PoetxError, match=f"'fc.weight' was converted with {field}=.* now compiled with {field}={other}"):
            conversion.adopt(weight, "fc.weight", PoetxConfig(**OPTIONS | {field: other}))

    @pytest.mark.parametrize(("field", "other"), [("route", "dense"), ("exclude", ("a",)), ("heads", ())])
    def test_settings_that_leave_the_blocks_alone_may_change(self, weight: nn.Parameter, field: str, other: object) -> None:
        factor = conversion.adopt(weight, "fc.weight", CONFIG)
        assert conversion.adopt(weight, "fc.weight", PoetxConfig(**OPTIONS | {field: other})) is factor

    def test_a_converted_weight_cannot_be_excluded_later(self, weight: nn.Parameter) -> None:
        conversion.adopt(weight, "fc.weight", CONFIG)
        with pytest.raises(PoetxError, match=r"'fc.weight' was converted before and is excluded now"):
            conversion.adopt(weight, "fc.weight", PoetxConfig(**OPTIONS | {"exclude": ("fc",)}))

    def test_a_factor_goes_with_its_weight(self) -> None:
        gc.collect()
        held = len(factors)
        weight = nn.Parameter(torch.randn(32, 48))
        conversion.adopt(weight, "fc.weight", CONFIG)
        assert len(factors) == held + 1
        del weight
        gc.collect()
        assert len(factors) == held


class TestLateAdoption:
    """Compiled code meets a weight that it was not made for."""

    @pytest.mark.parametrize(
        "spoil",
        [lambda weight: nn.init.zeros_(weight), lambda weight: weight.register_hook(lambda grad: None)],
        ids=["zero", "hook"],
    )
    def test_what_cannot_be_rotated_is_refused(self, spoil: Callable[[nn.Parameter], object]) -> None:
        first, second = nn.Linear(32, 32), nn.Linear(32, 32)
        spoil(second.weight)
        x = torch.randn(4, 32)
        rotating(first)(x)
        with pytest.raises(PoetxError, match="'weight' shares compiled code with a converted weight"):
            rotating(second)(x)
        assert factors.of_weight(second.weight) is None


class TestRelease:
    def test_the_weight_trains_as_an_ordinary_one_again(self) -> None:
        layer, x = nn.Linear(32, 48), torch.randn(4, 32)
        rotating(layer)(x).sum().backward()
        value = layer.weight.detach().clone()
        assert conversion.release(layer.weight) is not None
        assert factors.of_weight(layer.weight) is None
        assert torch.equal(layer.weight, value)
        assert layer.weight.grad is None
        layer(x).sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape

    def test_of_an_ordinary_weight_changes_nothing(self, weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        assert conversion.release(weight) is None
        assert torch.equal(weight.grad, torch.ones_like(weight))

    def test_it_may_be_converted_with_other_settings(self, weight: nn.Parameter) -> None:
        conversion.adopt(weight, "fc.weight", CONFIG)
        conversion.release(weight)
        conversion.adopt(weight, "fc.weight", PoetxConfig(block_size=32))
        assert factor_of(weight).rows.width == 32

    def test_reasons_are_forgotten(self) -> None:
        layer, x = nn.Linear(32, 48), torch.randn(4, 32)
        nn.init.zeros_(layer.weight)
        rotating(layer)(x)
        nn.init.normal_(layer.weight)
        assert conversion.skip_reason(layer.weight) is SkipReason.ZERO
        conversion.release(layer.weight)
        torch._dynamo.reset()
        rotating(layer)(x)
        assert factors.of_weight(layer.weight)


class Model(nn.Module):
    """Two linear layers; the second is an output head where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 48)
        self.last = nn.Linear(48, 32)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.last(torch.tanh(self.body(x)))
        return y if labels is None else F.cross_entropy(y, labels)


def train(compiled: Callable[..., Tensor], model: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    """Steps of an optimizer whose moments have the shape of what they move."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in batches:
        compiled(*batch).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class TestReasonsThatBind:
    """What began to train as a matrix goes on as one, though a later graph sees it otherwise."""

    def test_a_weight_that_began_at_zero(self) -> None:
        """The last batch of an epoch is smaller: its graph finds the weight no longer zero."""
        model = Model()
        nn.init.zeros_(model.last.weight)
        train(rotating(model), model, [(torch.randn(n, 32),) for n in (8, 8, 5, 8, 3)])
        assert model.last.weight.any()
        assert conversion.skip_reason(model.last.weight) is SkipReason.ZERO
        assert factors.of_weight(model.body.weight)

    def test_a_head_that_is_evaluated_with_gradients_on(self) -> None:
        model = Model()
        compiled, optimizer = rotating(model), torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(2):
            compiled(torch.randn(8, 32), torch.randint(0, 32, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
            compiled(torch.randn(8, 32))
        assert conversion.skip_reason(model.last.weight) is SkipReason.HEAD
        assert factors.of_weight(model.body.weight)

    def test_a_removed_gradient_hook(self) -> None:
        model = Model()
        hook = model.last.weight.register_hook(lambda grad: grad)
        compiled, optimizer = rotating(model), torch.optim.AdamW(model.parameters(), 1e-2)
        for n in (8, 5, 3):
            compiled(torch.randn(n, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            hook.remove()
        assert conversion.skip_reason(model.last.weight) is SkipReason.GRADIENT_HOOK

    def test_a_learned_query_whose_batch_size_becomes_symbolic(self) -> None:
        class Queries(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query = nn.Parameter(torch.randn(1, 32))
                self.project = nn.Parameter(torch.randn(32, 32))

            def forward(self, x: Tensor) -> Tensor:
                return x + torch.tanh(self.query).expand(x.shape[0], -1) @ self.project

        model = Queries()
        train(rotating(model), model, [(torch.randn(n, 32),) for n in (8, 5, 3)])
        assert conversion.skip_reason(model.project) is SkipReason.NO_INPUT

    def test_a_frozen_weight_may_thaw(self) -> None:
        model = Model()
        model.last.weight.requires_grad_(False)
        compiled = rotating(model)
        compiled(torch.randn(8, 32))
        assert conversion.skip_reason(model.last.weight) is SkipReason.FROZEN
        model.last.weight.requires_grad_()
        compiled(torch.randn(8, 32))
        assert factors.of_weight(model.last.weight)

    def test_a_weight_of_two_graphs_is_judged_by_both(self) -> None:
        """An embedding in one graph and a linear layer in the next are tied, though no graph shows it."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(32, 48)

            def forward(self, ids: Tensor) -> Tensor:
                x = self.table(ids)
                torch._dynamo.graph_break()
                return F.linear(x, self.table.weight)

        model = Tied()
        compiled = rotating(model)
        compiled(torch.arange(4))
        assert factors.of_weight(model.table.weight) is None
        assert conversion.skip_reason(model.table.weight) is SkipReason.EMBEDDING
