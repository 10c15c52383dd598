"""When a weight becomes a rotation, when it must stay what it is, and how it becomes ordinary again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import factor_of, values
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import poetx_compile
from poetx_compile import PoetxConfig, PoetxError, backend, conversion
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

    def test_where_one_is_refused_none_is_converted(self) -> None:
        first, second, x = Model(), Model(), torch.randn(4, 32)
        nn.init.zeros_(second.last.weight)
        rotating(first)(x)
        second.body.weight.grad = torch.ones(48, 32)
        with pytest.raises(PoetxError, match=r"'last\.weight' shares compiled code with a converted weight"):
            rotating(second)(x)
        assert not factors.of_module(second)
        assert torch.equal(second.body.weight.grad, torch.ones(48, 32))
        assert len(factors.of_module(first)) == 2


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class TestPrepare:
    """Any model, any number of times, and Dynamo goes on as if nothing had been compiled."""

    def test_layers_one_by_one(self) -> None:
        layers = [Block() for _ in range(12)]
        for layer in layers:
            assert poetx_compile.prepare(layer, torch.randn(4, 32), options=OPTIONS).rows[0].converted

    def test_one_model_many_times_and_then_training(self) -> None:
        graphs = []

        def counted(gm: fx.GraphModule, inputs: Any) -> Any:
            graphs.append(gm)
            return backend.poetx(gm, inputs, options=OPTIONS)

        model = Block()
        for _ in range(torch._dynamo.config.recompile_limit):
            poetx_compile.prepare(model, torch.randn(4, 32), options=OPTIONS)
        torch.compile(model, backend=counted)(torch.randn(4, 32)).sum().backward()
        assert len(graphs) == 1

    def test_between_two_steps(self) -> None:
        def trained(is_prepared: bool) -> list[Tensor]:
            torch.manual_seed(0)
            model = Model()
            compiled = rotating(model)
            batches = [(torch.randn(8, 32),) for _ in range(2)]
            train(compiled, model, batches)
            if is_prepared:
                poetx_compile.prepare(model, batches[0][0], options=OPTIONS)
            train(compiled, model, batches)
            return values(model)

        assert all(map(torch.equal, trained(True), trained(False)))

    def test_layers_of_one_code_in_graphs_of_their_own(self) -> None:
        class Broken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Block() for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    torch._dynamo.graph_break()
                    x = layer(x)
                return x

        model = Broken()
        poetx_compile.prepare(model, torch.randn(4, 32), options=OPTIONS)
        assert len(factors.of_module(model)) == 4

    def test_says_so_where_dynamo_does_nothing(self) -> None:
        with (
            torch.compiler.set_stance("force_eager"),
            pytest.raises(PoetxError, match="Dynamo did not hand over a graph of this model"),
        ):
            poetx_compile.prepare(Block(), torch.randn(4, 32), options=OPTIONS)

    def test_says_so_where_nothing_can_be_converted(self) -> None:
        model = Block()
        nn.init.zeros_(model.fc.weight)
        with pytest.raises(PoetxError, match="no linear layer of this model can be converted"):
            poetx_compile.prepare(model, torch.randn(4, 32), options=OPTIONS)
        assert conversion.skip_reason(model.fc.weight) is SkipReason.ZERO  # which the report shows

    @pytest.mark.parametrize("storage", ["folded", "int8"])
    def test_with_an_optimizer_whose_state_cannot_go_on_converts_nothing(self, storage: str) -> None:
        model, x = Block().bfloat16(), torch.randn(4, 32).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        before, grad = values(model), model.fc.weight.grad
        with pytest.raises(PoetxError, match=r"'fc\.weight' comes from ordinary training"):
            poetx_compile.prepare(model, x, optimizer=optimizer, options=OPTIONS | {"storage": storage})
        assert not factors.of_module(model)
        assert type(model.fc.weight) is nn.Parameter
        assert model.fc.weight.grad is grad
        assert all(map(torch.equal, values(model), before))


class TestAfterFailedCompilation:
    @pytest.fixture(autouse=True)
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """The inner compiler fails until this is undone."""

        monkeypatch.setattr(backend, "compile_with_aot_eager", lambda *_: 1 / 0)
        return monkeypatch

    def test_weights_train_as_ordinary_ones(self) -> None:
        model, x = Model(), torch.randn(8, 32)
        model(x).sum().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        with pytest.raises(BackendCompilerFailed, match="ZeroDivisionError"):
            rotating(model)(x)
        assert not factors.of_module(model)
        assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads))
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        assert model.body.weight.grad.shape == (48, 32)

    def test_reasons_are_forgotten(self, failing: pytest.MonkeyPatch) -> None:
        model, x = Model(), torch.randn(8, 32)
        with pytest.raises(BackendCompilerFailed):
            rotating(model, heads=["last"])(x)
        failing.undo()
        rotating(model, heads=[])(x)
        assert len(factors.of_module(model)) == 2

    def test_what_was_converted_before_stays(self, failing: pytest.MonkeyPatch) -> None:
        model, other, x = Block(), Block(), torch.randn(8, 32)
        failing.undo()
        rotating(model)(x)
        failing.setattr(backend, "compile_with_aot_eager", lambda *_: 1 / 0)
        both = nn.Sequential(model, other)
        with pytest.raises(BackendCompilerFailed, match="ZeroDivisionError"):
            rotating(both)(x)
        assert factors.of_weight(model.fc.weight)
        assert factors.of_weight(other.fc.weight) is None

    def test_a_running_step_goes_on_without_them(self, failing: pytest.MonkeyPatch) -> None:
        model, x = Model(), torch.randn(8, 32)
        plain = Model()
        plain.load_state_dict(model.state_dict())
        optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, plain)]

        def closure() -> Tensor:
            with pytest.raises(BackendCompilerFailed):
                rotating(model)(x)
            value = model(x).square().mean()
            value.backward()
            return value

        optimizers[0].step(closure)
        plain(x).square().mean().backward()
        optimizers[1].step()
        assert all(map(torch.equal, values(model), values(plain)))
        assert optimizers[0].param_groups[0]["params"][0] is model.body.weight


class TestRestore:
    def test_ordinary_training_goes_on_where_it_was(self) -> None:
        """As the refusal of its state says."""
        model, x = Model(), torch.randn(8, 32)
        plain = Model()
        plain.load_state_dict(model.state_dict())
        optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, plain)]

        def step(compiled: Callable[..., Tensor], optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()

        step(model, optimizers[0])
        with pytest.raises(PoetxError, match=r"call poetx_compile\.restore\(model\), and compile with backend='inductor'"):
            step(rotating(model), optimizers[0])
        poetx_compile.restore(model)
        step(torch.compile(model, backend="aot_eager"), optimizers[0])
        for _ in range(2):
            step(plain, optimizers[1])
        for now, expected in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(now, expected)

    def test_is_refused_while_ddp_waits_for_rotations(self) -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model, x = Block(), torch.randn(4, 32)
            poetx_compile.prepare(model, x, options=OPTIONS)
            wrapper = nn.parallel.DistributedDataParallel(model)
            with pytest.raises(PoetxError, match=r"DistributedDataParallel.* still wraps it; delete the wrapper"):
                poetx_compile.restore(model)
            assert factors.of_weight(model.fc.weight)
            del wrapper
            assert poetx_compile.restore(model) == ["fc.weight"]
        finally:
            torch.distributed.destroy_process_group()


def test_a_config_serves_as_options() -> None:
    model = Block()
    torch.compile(model, backend="poetx", options=CONFIG)(torch.randn(4, 32)).sum().backward()  # type: ignore[arg-type]
    assert factor_of(model.fc.weight).config == CONFIG


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

    @pytest.mark.filterwarnings("ignore:.*of which no weight is rotated")
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

    @pytest.mark.xfail(torch.__version__ < "2.12", reason="torch 2.11 does not look at requires_grad again", strict=True)
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
