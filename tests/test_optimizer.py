"""Whatever optimizer a script uses, and however it uses it, it trains the rotations as it would train any parameter."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Explicit, factor_of, loss, network, rotating, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import FUSED, OPTIMIZERS, REFUSED
from torch import Tensor, nn, optim
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import poetx_compile
from poetx_compile import PoetxError
from poetx_compile.optim import SkewMuon
from poetx_compile.registry import factors

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "constant": partial(lr_scheduler.ConstantLR, total_iters=2),
    "linear": partial(lr_scheduler.LinearLR, total_iters=3),
    "step": partial(lr_scheduler.StepLR, step_size=2),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.7),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=4),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.8),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=6, cycle_momentum=False),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=2, cycle_momentum=False),
    "warm-up, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)],
        milestones=[2],
    ),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5),
}


@dataclass(frozen=True)
class Plan:
    """How a training script goes about it."""

    steps: int
    accumulation: int
    clip: Callable[[Any], Any] | None
    scheduler: str

    def run(
        self,
        model: Callable[[Tensor], Tensor],
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        after_step: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Train; returns the learning rates on the way."""
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        rates = []
        for step in range(self.steps):
            total = torch.zeros((), dtype=torch.float64)
            for micro in range(self.accumulation):
                part = loss(model, step * self.accumulation + micro) / self.accumulation
                part.backward()
                total += part.detach()
            if self.clip is not None:
                self.clip(parameters)
            optimizer.step()
            after_step()
            optimizer.zero_grad()
            scheduler.step(*[total.item()] if self.scheduler == "plateau" else [])
            rates += [group["lr"] for group in optimizer.param_groups]
        return rates


CLIPS = (None, partial(clip_grad_norm_, max_norm=0.1), partial(clip_grad_value_, clip_value=0.01))
plans = st.builds(
    Plan,
    steps=st.integers(2, 5),
    accumulation=st.integers(1, 3),
    clip=st.sampled_from(CLIPS),
    scheduler=st.sampled_from(list(SCHEDULERS)),
)


class TestEveryTorchOptimizer:
    """Compared with a loop that trains ``q`` as an ordinary parameter of ``G(q) W G(q)``, by autograd, in float64."""

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    @settings(max_examples=10)
    @given(plan=plans, data=st.data())
    def test_steps_as_on_the_explicit_parametrisation(self, kind: str, plan: Plan, data: st.DataObject) -> None:
        implementations: list[dict[str, bool]] = [{}, {"foreach": True}, *[{"fused": True}] * (kind in FUSED)]
        implementation = data.draw(st.sampled_from(implementations))
        model = network()
        explicit = Explicit(model)

        ours = OPTIMIZERS[kind](model.parameters(), **implementation)
        rates = plan.run(rotating(model), list(model.parameters()), ours)

        theirs = OPTIMIZERS[kind](explicit.parameters(), **implementation)
        gain = 1 / theirs.param_groups[0]["eps"][1] if kind == "Adafactor" else 1.0
        expected_rates = plan.run(explicit, explicit.parameters(), theirs, partial(explicit.fold, gain))

        close(values(model), values(explicit.model))
        assert rates == expected_rates

    def test_is_tested_here_or_refused_by_name(self) -> None:
        classes = {name for name, thing in vars(optim).items() if isinstance(thing, type) and issubclass(thing, Optimizer)}
        trained = {kind.split(",")[0] for kind in OPTIMIZERS}
        assert classes - {"Optimizer"} == trained | set(REFUSED)

    @pytest.mark.parametrize("kind", ["AdamW", "Rprop", "Adagrad", "NAdam", "SGD, momentum", "Adafactor"])
    def test_starts_anew_with_each_draw_of_permutations(self, kind: str) -> None:
        model = network()
        explicit = Explicit(model)
        ours = OPTIMIZERS[kind](model.parameters())
        train(rotating(model, permutation_period=2), ours, range(5))

        theirs = OPTIMIZERS[kind](explicit.parameters())
        gain = 1 / theirs.param_groups[0]["eps"][1] if kind == "Adafactor" else 1.0
        for step in range(5):
            train(explicit, theirs, [step])
            explicit.fold(gain)
            if step % 2:
                explicit.redraw(theirs, OPTIMIZERS[kind](explicit.parameters()))
        close(values(model), values(explicit.model))

    @settings(max_examples=20)
    @given(
        block=st.sampled_from([4, 12, 16, 64]),
        chunk=st.sampled_from([1, 2, 4]),
        scale=st.sampled_from([0.5, 1.0, 3.0]),
        route=st.sampled_from(["auto", "gram", "dense"]),
        sides=st.sampled_from(["both", "rows", "columns"]),
        updates=st.sampled_from(["orthogonal", "given"]),
        seed=st.integers(0, 99),
    )
    def test_with_any_blocks_scale_and_route(
        self, block: int, chunk: int, scale: float, route: str, sides: str, updates: str, seed: int
    ) -> None:
        torch._dynamo.reset()
        options = dict(block_size=block, chunk=chunk, scale=scale, route=route, sides=sides, updates=updates, seed=seed)
        model = network()
        explicit = Explicit(model, **options)
        plan = Plan(steps=3, accumulation=1, clip=None, scheduler="constant")
        plan.run(rotating(model, **options), list(model.parameters()), optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        optimizer = optim.SGD(explicit.parameters(), lr=0.05, momentum=0.9)
        plan.run(explicit, explicit.parameters(), optimizer, explicit.fold)
        close(values(model), values(explicit.model))

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_weight_decay_changes_no_rotation(self, kind: str) -> None:
        if kind == "Rprop":
            pytest.skip("has no weight decay")
        trained = []
        for decay in (0.0, 0.5):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(22, 20, bias=False)).double()
            train(rotating(model), OPTIMIZERS[kind](model.parameters(), weight_decay=decay), range(3))
            trained.append(model[0].weight)
        exact(*trained)


def trained(
    make: Callable[[nn.Module], Optimizer] = lambda model: optim.AdamW(model.parameters(), lr=0.01),
    dtype: torch.dtype = torch.float64,
    steps: int = 4,
) -> list[Tensor]:
    """What the plainest script arrives at: build, compile, loop."""
    model = network(dtype)
    train(rotating(model), make(model), range(steps))
    return values(model)


class TestHowScriptsUseThem:
    def test_built_after_the_first_forward_and_backward(self) -> None:
        model = network()
        compiled = rotating(model)
        loss(compiled, 0).backward()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        optimizer.step()
        optimizer.zero_grad()
        train(compiled, optimizer, range(1, 4))
        exact(values(model), trained())

    def test_built_from_named_parameters(self) -> None:
        exact(trained(lambda model: optim.AdamW(model.named_parameters(), lr=0.01)), trained())

    def test_two_optimizers_share_a_model(self) -> None:
        model = network()
        compiled = rotating(model)
        first, second = (optim.AdamW(layer.parameters(), lr=0.01) for layer in (model[:2], model[2:]))
        for step in range(4):
            loss(compiled, step).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        exact(values(model), trained())

    def test_groups_with_their_own_learning_rates(self) -> None:
        model = network()
        explicit = Explicit(model)

        def grouped(parameters: list[nn.Parameter]) -> Optimizer:
            return optim.SGD([{"params": parameters[:2], "lr": 0.2}, {"params": parameters[2:]}], lr=0.05, momentum=0.9)

        plan = Plan(steps=4, accumulation=1, clip=None, scheduler="exponential")
        plan.run(rotating(model), list(model.parameters()), grouped(list(model.parameters())))
        plan.run(explicit, explicit.parameters(), grouped(explicit.parameters()), explicit.fold)
        close(values(model), values(explicit.model))

    @pytest.mark.xfail(
        torch.__version__ < "2.12",
        reason="torch 2.11 does not compile anew for a thawed weight, with any backend",
        strict=True,
    )
    def test_layers_thawed_and_added_late(self) -> None:
        model = network()
        explicit = Explicit(model)
        explicit.parameters()[2].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        for net, parameters, fold in (
            (rotating(model), list(model.parameters()), lambda: None),
            (explicit, explicit.parameters(), explicit.fold),
        ):
            optimizer = optim.Adam(parameters[:2], lr=0.01)
            for step in range(4):
                if step == 2:
                    parameters[2].requires_grad_(True)
                    optimizer.add_param_group({"params": parameters[2:], "lr": 0.02})
                train(net, optimizer, [step])
                fold()
        close(values(model), values(explicit.model))

    def test_a_closure_whose_first_call_converts_the_model(self) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for step in range(4):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                value = loss(compiled, step)
                value.backward()
                return value

            optimizer.step(closure)
        exact(values(model), trained())

    def test_a_closure_that_is_the_first_use_of_poetx_in_the_process(self) -> None:
        script = """
            import torch
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
            spectrum = torch.linalg.svdvals(model[0].weight)
            start = model[0].weight.detach().clone()
            compiled = torch.compile(model, backend="poetx", options={"inner": "aot_eager", "block_size": 16})
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            def closure():
                optimizer.zero_grad()
                value = compiled(torch.ones(4, 16)).square().mean()
                value.backward()
                return value
            for _ in range(2):
                optimizer.step(closure)
                assert optimizer.param_groups[0]["params"][0] is model[0].weight
            assert not torch.equal(model[0].weight, start)
            torch.testing.assert_close(torch.linalg.svdvals(model[0].weight), spectrum, rtol=1e-5, atol=0)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("make", [OPTIMIZERS["SGD, momentum"], lambda parameters: SkewMuon(parameters, 1e-2)])
    def test_a_compiled_step(self, make: Callable[..., optim.Optimizer]) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = make(model.parameters())
        step = torch.compile(optimizer.step, backend="aot_eager")
        for number in range(4):
            loss(compiled, number).backward()
            step()
            optimizer.zero_grad()
        close(values(model), trained(lambda model: make(model.parameters())))
        assert factor_of(model[0].weight).steps == 4

    @pytest.mark.parametrize("fused", [False, True])
    def test_grad_scaler_and_clipping(self, fused: bool) -> None:
        def run(scaler: torch.amp.GradScaler) -> list[Tensor]:
            model = network(torch.float32)
            compiled = rotating(model)
            optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
            for step in range(4):
                scaler.scale(loss(compiled, step, torch.float32)).backward()
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            return values(model)

        exact(run(torch.amp.GradScaler("cpu", init_scale=2.0**16)), run(torch.amp.GradScaler("cpu", enabled=False)))

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_that_grad_scaler_skips_changes_and_counts_nothing(self, fused: bool) -> None:
        model = network(torch.float32)
        compiled = rotating(model, permutation_period=1)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        before = values(model)
        scaler.scale(loss(compiled, 0, torch.float32) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        exact(values(model), before)
        assert factor_of(model[0].weight).steps == factor_of(model[0].weight).epoch == 0

        optimizer.zero_grad()
        scaler.scale(loss(compiled, 1, torch.float32)).backward()
        scaler.step(optimizer)
        assert factor_of(model[0].weight).steps == factor_of(model[0].weight).epoch == 1
        assert not torch.equal(model[0].weight, before[0])

    def test_the_clipped_norm_is_that_of_the_rotations(self) -> None:
        model = network()
        explicit = Explicit(model)
        optimizer = optim.SGD(model.parameters())
        loss(rotating(model), 0).backward()
        loss(explicit, 0).backward()
        close(clip_grad_norm_(model.parameters(), 1e-3), clip_grad_norm_(explicit.parameters(), 1e-3))
        held = optimizer.param_groups[0]["params"]
        close([p.grad for p in held], [p.grad for p in explicit.parameters()])

    @pytest.mark.parametrize("to_none", [False, True])
    def test_zero_grad(self, to_none: bool) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        loss(compiled, 0).backward()
        for reset in (optimizer.zero_grad, model.zero_grad):
            reset(set_to_none=to_none)
            grad = model[0].weight.grad
            assert grad is None if to_none else not grad.any()
            loss(compiled, 0).backward()
        expected = model[0].weight.grad.clone()
        model.zero_grad(set_to_none=to_none)
        loss(compiled, 0).backward()
        exact(model[0].weight.grad, expected)

    def test_outside_step_it_holds_the_weights(self) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
        mine = list(model.parameters())

        def check() -> None:
            held = optimizer.param_groups[0]
            assert [id(p) for p in held["params"]] == [id(p) for p in model.parameters()] == [id(p) for p in mine]
            assert held["param_names"] == [name for name, _ in model.named_parameters()]
            assert {id(p) for p in optimizer.state} <= {id(p) for p in mine}

        for step in range(3):
            loss(compiled, step).backward()
            check()
            optimizer.step()
            check()
            assert len(optimizer.state) == len(mine)
            optimizer.zero_grad()
        assert list(model.state_dict()) == list(network().state_dict())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("period", [0, 3])
    def test_a_deep_copy_of_model_and_optimizer_goes_on_alike(self, dtype: torch.dtype, period: int) -> None:
        model = network(dtype)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        compiled = rotating(model, permutation_period=period)
        train(compiled, optimizer, range(4))
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        train(compiled, optimizer, range(4, 8))
        train(rotating(twin, permutation_period=period), its_optimizer, range(4, 8))
        exact(values(twin), values(model))
        assert not torch.equal(values(twin)[0], network(dtype)[0].weight)

    def test_models_that_train_in_threads_of_their_own(self) -> None:
        class Together(optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                both.wait()
                result = super().step(closure)
                both.wait()
                return result

        both = threading.Barrier(2, timeout=60)
        runs = []
        for _ in range(2):
            model = network()
            compiled = rotating(model)
            loss(compiled, 0)
            runs.append(
                (model, threading.Thread(target=train, args=(compiled, Together(model.parameters(), lr=0.01), range(4))))
            )
        for _, thread in runs:
            thread.start()
        for model, thread in runs:
            thread.join()
            exact(values(model), trained())

    def test_an_average_of_weights_made_before_conversion(self) -> None:
        model = network()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        expected = values(model)
        compiled = rotating(model)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            train(compiled, optimizer, [step])
            average.update_parameters(model)
            expected = values(model) if step == 0 else [e.lerp(p, 0.1) for e, p in zip(expected, values(model))]
        close(values(average), expected)


class Lion(Optimizer):
    """Written as many are: through ``.data``, past autograd and version counters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p.data))
                p.data.add_(momentum.mul(0.9).add(p.grad, alpha=0.1).sign(), alpha=-group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


class Derived(optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(Optimizer):
    """Shares the groups of another optimizer and lets it step, once or several times."""

    def __init__(self, base: Optimizer, times: int = 1) -> None:
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.base = base
        self.times = times

    def step(self, closure: None = None) -> None:
        for _ in range(self.times):
            self.base.step()


@torch.no_grad()
def lag_behind(parameters: Iterable[Tensor], state: MutableMapping[Any, Any]) -> None:
    for p in parameters:
        slow = state[p].setdefault("slow", p.clone()).lerp_(p, 0.5)
        p.copy_(slow)


class Lookahead(Wrapper):
    """Goes on after the step that it wraps: every parameter goes back half the way to its slow copy."""

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            lag_behind(group["params"], self.state)


class TestOptimizersOfTheirOwn:
    def test_one_that_writes_data(self) -> None:
        model = network()
        explicit = Explicit(model)
        plan = Plan(steps=4, accumulation=1, clip=None, scheduler="linear")
        plan.run(rotating(model), list(model.parameters()), Lion(model.parameters(), 0.01))
        plan.run(explicit, explicit.parameters(), Lion(explicit.parameters(), 0.01), explicit.fold)
        close(values(model), values(explicit.model))

    def test_a_subclass_that_calls_its_base(self) -> None:
        optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch hooks a class's step when the first instance is built
        exact(trained(lambda model: Derived(model.parameters(), lr=0.01)), trained())

    def test_a_wrapper_that_steps_another(self) -> None:
        exact(trained(lambda model: Wrapper(optim.AdamW(model.parameters(), lr=0.01))), trained())

    @pytest.mark.parametrize("period", [0, 2])
    def test_a_wrapper_that_moves_the_weights_after_the_step(self, period: int) -> None:
        make = OPTIMIZERS["AdamW"]
        model = network()
        explicit = Explicit(model)
        train(rotating(model, permutation_period=period), Lookahead(make(model.parameters())), range(5))
        optimizer = make(explicit.parameters())
        slow: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for step in range(5):
            train(explicit, optimizer, [step])
            explicit.fold()
            lag_behind(explicit.model.parameters(), slow)
            if period and step % period == period - 1:
                explicit.redraw(optimizer, make(explicit.parameters()))
        close(values(model), values(explicit.model))

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_wrapped_step_counts_once(self, times: int) -> None:
        model = network()
        optimizer = Wrapper(optim.AdamW(model.parameters(), lr=0.01), times)
        compiled = rotating(model, permutation_period=2)
        train(compiled, optimizer, range(3))
        factor = factor_of(model[0].weight)
        assert (factor.steps, factor.epoch) == (3, 1)
        assert optimizer.base.state[model[0].weight]["step"] == times, "the moments started anew with the second draw"
        assert optimizer.base.state[model[0].bias]["step"] == 3 * times

    def test_one_whose_step_raises(self) -> None:
        class Stumbling(optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                result = super().step(closure)
                if stumble:
                    raise ArithmeticError
                return result

        model = network()
        compiled = rotating(model, permutation_period=3)
        optimizer = Stumbling(model.parameters(), lr=0.01)
        stumble = False
        train(compiled, optimizer, range(2))
        before, stumble = values(model), True
        with pytest.raises(ArithmeticError):
            train(compiled, optimizer, [2])
        exact([model[0].weight, model[2].weight], [before[0], before[2]])

        loss(compiled, 3).backward()
        exact([model[0].weight, model[2].weight], [before[0], before[2]])
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
        assert model[0].weight in optimizer.state
        stumble = False
        optimizer.step()
        assert not torch.equal(model[0].weight, before[0])
        assert factor_of(model[0].weight).steps == 3

    def test_another_steps_after_one_that_raised(self) -> None:
        class Broken(optim.SGD):
            def step(self, closure: Any = None) -> Any:
                raise ArithmeticError

        model = network()
        compiled = rotating(model)
        loss(compiled, 0).backward()
        with pytest.raises(ArithmeticError):
            Broken(model.parameters(), lr=0.1).step()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        optimizer.step()
        optimizer.zero_grad()
        train(compiled, optimizer, range(1, 4))
        exact(values(model), trained())
        assert factor_of(model[0].weight).steps == 4


class Sam(Optimizer):
    """Sharpness-aware minimisation: a second forward pass, at a perturbed point, within ``step``."""

    def __init__(self, params: Any, base: type[Optimizer], **settings: Any) -> None:
        super().__init__(params, settings)
        self.base = base(self.param_groups, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        moves = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"]]
        for p, move in moves:
            p.add_(move)
        with torch.enable_grad():
            closure()
        for p, move in moves:
            p.sub_(move)
        self.base.step()


class TestRefusals:
    """What cannot train a rotation says so, changes nothing, and leaves the way free for what can."""

    def after_refusal(self, model: nn.Sequential, optimizer: Optimizer, before: list[Tensor]) -> None:
        exact(values(model), before)
        mine = {id(p) for p in model.parameters()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= mine
        assert not any(torch.is_tensor(value) for entry in optimizer.state.values() for value in entry.values())
        train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(2))
        assert not torch.equal(model[0].weight, before[0])

    @pytest.mark.parametrize("kind", REFUSED)
    def test_optimizers_that_need_something_else(self, kind: str) -> None:
        model = network()
        compiled = rotating(model)
        make, reason = REFUSED[kind]
        optimizer = make(model)
        value = loss(compiled, 0)
        value.backward()
        before = values(model)
        with pytest.raises(PoetxError, match=f"{kind} cannot train .*{reason}" + r".*AdamW.*exclude.*0\.weight"):
            optimizer.step(lambda: value)
        self.after_refusal(model, optimizer, before)

    def test_lbfgs_whose_closure_converts_the_model(self) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = optim.LBFGS(model.parameters())
        before = values(model)

        def closure() -> Tensor:
            value = loss(compiled, 0)
            value.backward()
            return value

        for _ in range(2):
            with pytest.raises(BackendCompilerFailed, match="LBFGS cannot train the rotation"):
                optimizer.step(closure)
            assert not factors.of_module(model)
        self.after_refusal(model, optimizer, before)

    def test_one_that_leaves_all_weights_out_after_restore(self) -> None:
        """As the sentence says."""
        model = network()
        optimizer = optim.LBFGS(model.parameters(), max_iter=2)
        value = loss(rotating(model), 0)
        value.backward()
        with pytest.raises(PoetxError, match=r"call poetx_compile\.restore\(model\), and leave the weight out"):
            optimizer.step(lambda: value)
        assert poetx_compile.restore(model) == ["0.weight", "2.weight"]
        compiled = rotating(model, exclude=["*"])

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(compiled, 0)
            value.backward()
            return value

        before = values(model)
        optimizer.step(closure)
        assert not torch.equal(model[0].weight, before[0])

    def test_a_forward_at_a_perturbed_point(self) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = Sam(model.parameters(), optim.SGD, lr=0.1)

        def closure() -> None:
            optimizer.zero_grad()
            loss(compiled, 0).backward()

        closure()
        before = values(model)
        with pytest.raises(PoetxError, match=r"Sam moved the rotation of '0\.weight' and ran the model again.*exclude"):
            optimizer.step(closure)
        exact([model[0].weight, model[2].weight], [before[0], before[2]])
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before):
                parameter.copy_(value)
        optimizer.zero_grad()
        loss(compiled, 0)
        self.after_refusal(model, optimizer, before)


def test_a_users_hook_after_the_step_sees_the_folded_weight() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(
        lambda opt, args, kwargs: seen.append(opt.param_groups[0]["params"][0].detach().clone())
    )
    for step in range(2):
        loss(rotating(model), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(seen[step], model[0].weight)
