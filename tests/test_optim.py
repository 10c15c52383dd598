"""SkewMuon against float64 oracles: singular values by SVD, and a plain loop over the explicit parametrisation."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Experts, Explicit, factor_of, loss, network, rotating, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_singular_values
from strategies import OwningFactor, normal
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from poetx_compile import Metrics, PoetxConfig, PoetxError, prepare, retraction
from poetx_compile.kernels.polar import orthogonalize_skew
from poetx_compile.optim import SkewMuon

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
QUINTIC = (3.4445, -4.7750, 2.0315)


def reference_step(
    explicit: Explicit, memory: dict[str, Tensor], lr: float, momentum: float, nesterov: bool, adjust: str
) -> None:
    """What SkewMuon writes into the explicit skew parameters, block by block."""
    for name, skew in explicit.skews.items():
        factor = explicit.factors[name]
        average = memory[name] = momentum * memory.get(name, torch.zeros_like(skew)) + (1 - momentum) * skew.grad
        wanted = (1 - momentum) * skew.grad + momentum * average if nesterov else average
        at = 0
        for side in (factor.rows, factor.columns):
            rows, columns = torch.triu_indices(side.width, side.width, 1)
            for _ in range(side.count):
                part = slice(at, at + side.skew_per_block)
                block = torch.zeros(side.width, side.width, dtype=skew.dtype)
                block[rows, columns] = wanted[part]
                turned = by_singular_values(block - block.T, QUINTIC, 5)
                rate = lr * (0.2 * math.sqrt(side.width) if adjust == "match_rms_adamw" else 1.0)
                skew.data[part] = -rate * turned[rows, columns]
                at += side.skew_per_block


class TestSteps:
    @settings(max_examples=12)
    @given(
        momentum=st.sampled_from([0.5, 0.95]),
        nesterov=st.booleans(),
        adjust=st.sampled_from(["match_rms_adamw", "original"]),
        scale=st.sampled_from([1.0, 0.5]),
        foreach=st.booleans(),
    )
    def test_as_on_the_explicit_parametrisation(
        self, momentum: float, nesterov: bool, adjust: str, scale: float, foreach: bool
    ) -> None:
        model = network()
        explicit = Explicit(model, scale=scale, updates="given")
        ours = SkewMuon(
            model.parameters(),
            0.02,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust,
            foreach=foreach,
            weight_decay=0.1,
        )
        schedule = lr_scheduler.ExponentialLR(ours, 0.7)
        compiled = rotating(model, scale=scale)
        others = [parameter for name, parameter in explicit.model.named_parameters() if name not in explicit.weights]
        theirs = AdamW(others, 0.02, weight_decay=0.1)
        memory: dict[str, Tensor] = {}
        for step in range(4):
            loss(compiled, step).backward()
            ours.step()
            schedule.step()
            ours.zero_grad()

            loss(explicit, step).backward()
            reference_step(explicit, memory, 0.02 * 0.7**step, momentum, nesterov, adjust)
            theirs.param_groups[0]["lr"] = 0.02 * 0.7**step
            theirs.step()
            explicit.fold()
            for parameter in explicit.parameters():
                parameter.grad = None
        close(values(model), values(explicit.model))

    def test_every_channel_turns_by_the_angle_of_the_docstring(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False)).double()
        compiled = torch.compile(model, backend="poetx", options={"inner": "aot_eager", "block_size": 64, "scale": 2.0})
        optimizer = SkewMuon(model.parameters(), lr=1e-3)
        metrics = Metrics(model)
        generator = torch.Generator().manual_seed(0)
        compiled(torch.randn(256, 64, generator=generator, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        angle = metrics.last["poetx/angle/0.weight"]
        assert angle == pytest.approx(2 * 2.0 * 0.2 * 1e-3 * math.sqrt(64), rel=0.25)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_momentum_of_all_at_once_is_that_of_each_alone(self, nesterov: bool, dtype: torch.dtype, device: str) -> None:
        """Bit by bit, where groups differ and another dtype stands between."""
        config = PoetxConfig(block_size=16, chunk=4, skew_dtype="bfloat16")
        dtypes = [dtype, dtype, torch.float32, dtype]
        rotated = [
            OwningFactor(nn.Parameter(normal(40, 16 * n, seed=n, dtype=kind, device=device)), str(n), config)
            for n, kind in enumerate(dtypes, 1)
        ]
        optimizer = SkewMuon(
            [
                {"params": [factor.weight for factor in rotated[:2]], "momentum": 0.3},
                {"params": [factor.weight for factor in rotated[2:]]},
            ],
            nesterov=nesterov,
        )
        groups = [optimizer.param_groups[place] for place in (0, 0, 1, 1)]
        averages = [torch.zeros_like(factor.q) for factor in rotated]
        for step in range(1, 4):
            grads = [normal(*factor.q.shape, seed=step, dtype=factor.q.dtype, device=device) for factor in rotated]
            found = optimizer._with_momentum(list(zip(rotated, groups, grads)))
            assert [(factor, id(group)) for factor, group, _ in found] == list(zip(rotated, map(id, groups)))
            for (factor, group, update), grad, average in zip(found, grads, averages):
                momentum = group["momentum"]
                average.lerp_(grad, 1 - momentum)
                exact(update, grad.lerp(average, momentum) if nesterov else average)
                exact(optimizer.state[factor.q]["momentum_buffer"], average)
                assert optimizer.state[factor.q]["step"] == step

    def test_batches_of_any_size_end_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def trained() -> list[Tensor]:
            torch._dynamo.reset()
            model = network()
            train(rotating(model), SkewMuon(model.parameters(), lr=0.01), range(3))
            return values(model)

        together = trained()
        monkeypatch.setattr(retraction, "SKEWS_PER_BATCH", 1)
        close(trained(), together)

    def test_stacks_and_kernels(self) -> None:
        model = Experts()
        compiled = rotating(model, include_conv=True)
        before = values(model)
        train(compiled, SkewMuon(model.parameters(), lr=1e-2), range(3))
        for weight, old in ((model.experts, before[0]), (model.conv.weight, before[1])):
            factor = factor_of(weight)
            matrices, originals = weight.detach().reshape(factor.stack.shape), old.reshape(factor.stack.shape)
            assert not torch.equal(matrices, originals)
            close(torch.linalg.svdvals(matrices), torch.linalg.svdvals(originals))

    def test_groups_have_their_own_settings(self) -> None:
        model = network()
        groups = [
            {"params": [model[0].weight], "lr": 0.0},
            {"params": [model[2].weight], "momentum": 0.5, "nesterov": False},
        ]
        optimizer = SkewMuon(groups, lr=0.01)
        optimizer.add_param_group({"params": [*model[3].parameters(), model[0].bias]})
        assert [group["momentum"] for group in optimizer.param_groups] == [0.95, 0.5, 0.95]
        before = values(model)
        train(rotating(model), optimizer, range(2))
        exact(model[0].weight.detach(), before[0])
        assert not torch.equal(model[2].weight, before[2])
        assert not torch.equal(model[3].weight, before[3])

    def test_learns(self) -> None:
        model = network()
        compiled = rotating(model)
        first = loss(compiled, 0).item()
        optimizer = SkewMuon(model.parameters(), lr=0.02)
        for _ in range(40):
            train(compiled, optimizer, [0])
        assert loss(compiled, 0).item() < 0.5 * first

    def test_a_hook_of_the_step_runs_once(self) -> None:
        AdamW([nn.Parameter(torch.zeros(1))])  # from now on torch runs hooks around AdamW's own step
        model = network()
        optimizer = SkewMuon(model.parameters())
        seen: list[bool] = []
        optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["params"][0] is model[0].weight))
        train(rotating(model), optimizer, range(2))
        assert seen == [True, True]

    def test_a_closure_whose_first_call_converts_the_model(self) -> None:
        def run(with_closure: bool) -> list[Tensor]:
            torch._dynamo.reset()
            model = network()
            compiled, optimizer = rotating(model), SkewMuon(model.parameters(), lr=0.01)
            for step in range(3):

                def closure(step: int = step) -> Tensor:
                    optimizer.zero_grad()
                    value = loss(compiled, step)
                    value.backward()
                    return value

                if with_closure:
                    assert optimizer.step(closure) is not None
                else:
                    closure()
                    optimizer.step()
            return values(model)

        exact(run(True), run(False))

    @pytest.mark.parametrize("fused", [False, True])
    def test_grad_scaler(self, fused: bool) -> None:
        def run(scale: float, infinite_at: int) -> tuple[list[Tensor], int]:
            torch._dynamo.reset()
            model = network(torch.float32)
            compiled = rotating(model)
            optimizer = SkewMuon(model.parameters(), lr=0.01, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
            for step in range(4):
                value = loss(compiled, step, torch.float32)
                scaler.scale(value * (float("inf") if step == infinite_at else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            return values(model), int(optimizer.state[model[0].weight]["step"])

        scaled, plain, skipped = run(2.0**12, -1), run(1.0, -1), run(2.0**12, 3)
        exact(scaled[0], plain[0])
        assert (scaled[1], plain[1], skipped[1]) == (4, 4, 3)


class TestResume:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("period", [0, 3])
    @pytest.mark.parametrize("fused", [False, True])
    def test_is_exact(self, dtype: torch.dtype, period: int, fused: bool) -> None:
        def fresh() -> tuple[nn.Module, Callable[[Tensor], Tensor], SkewMuon]:
            model = network(dtype)
            optimizer = SkewMuon(model.parameters(), lr=0.01, fused=fused)
            return model, rotating(model, permutation_period=period), optimizer

        model, compiled, optimizer = fresh()
        train(compiled, optimizer, range(4))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        train(compiled, optimizer, range(4, 8))

        torch._dynamo.reset()
        file.seek(0)
        weights, states = torch.load(file, weights_only=True)
        resumed, recompiled, restarted = fresh()
        resumed.load_state_dict(weights)
        restarted.load_state_dict(states)
        train(recompiled, restarted, range(4, 8))
        exact(values(resumed), values(model))

    def test_copies_go_on_alike(self) -> None:
        model = network()
        optimizer = SkewMuon(model.parameters(), lr=0.01)
        train(rotating(model), optimizer, range(2))
        other, copied = copy.deepcopy((model, optimizer))
        train(rotating(model), optimizer, range(2, 4))
        train(rotating(other), copied, range(2, 4))
        exact(values(other), values(model))

    def test_a_pickled_one_knows_its_settings(self) -> None:
        optimizer = pickle.loads(pickle.dumps(SkewMuon([nn.Parameter(torch.zeros(2))], momentum=0.5)))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "reason"),
        [
            ({"momentum": 1.0}, "momentum must be from 0 to below 1, not 1.0"),
            ({"momentum": -0.1}, "momentum must be from 0 to below 1"),
            ({"momentum": "x"}, "momentum must be from 0 to below 1, not 'x'"),
            ({"momentum": 0.0}, "nesterov=True needs momentum above 0"),
            ({"ns_steps": 0}, "ns_steps must be from 1 to 99, not 0"),
            ({"ns_steps": 2.5}, "ns_steps must be from 1 to 99"),
            ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
            ({"ns_coefficients": ("a", 1, 2)}, "ns_coefficients must be three numbers"),
            ({"adjust_lr_fn": "rms"}, "adjust_lr_fn must be one of match_rms_adamw, original, not 'rms'"),
        ],
    )
    def test_settings(self, setting: dict[str, Any], reason: str) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        with pytest.raises(PoetxError, match=reason):
            SkewMuon([parameter], **setting)
        with pytest.raises(PoetxError, match=reason):
            SkewMuon([{"params": [parameter], **setting}])
        optimizer = SkewMuon([parameter])
        with pytest.raises(PoetxError, match=reason):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **setting})
        assert len(optimizer.param_groups) == 1

    def test_settings_of_adamw_are_its_own_to_refuse(self) -> None:
        with pytest.raises(ValueError, match="Invalid learning rate"):
            SkewMuon([nn.Parameter(torch.zeros(2))], lr=-1.0)
        with pytest.raises(TypeError, match="Tensor"):
            SkewMuon(nn.Parameter(torch.zeros(2)))

    def test_a_model_without_rotations(self) -> None:
        model = network()
        optimizer = SkewMuon(model.parameters())
        before = values(model)
        loss(model, 0).backward()
        with pytest.raises(PoetxError, match="none of its parameters is one"):
            optimizer.step()
        exact(values(model), before)

    def test_a_model_whose_rotations_another_optimizer_holds(self) -> None:
        model = network()
        compiled = rotating(model)
        optimizer = SkewMuon([model[0].bias])
        loss(compiled, 0).backward()
        with pytest.raises(
            PoetxError, match=r"no weight that it holds was converted; poetx_compile.report\(model\) says why"
        ):
            optimizer.step()

    @pytest.mark.parametrize(
        "setting", [{}, {"foreach": True}, {"foreach": False}, {"fused": False}, {"fused": True}], ids=str
    )
    @pytest.mark.parametrize("before", ["conversion", "first step", "another step"])
    @pytest.mark.parametrize("trained", [0, 2])
    @pytest.mark.parametrize("with_settings", [True, False])
    def test_state_of_adamw(self, with_settings: bool, trained: int, before: str, setting: dict[str, Any]) -> None:
        """Whenever it arrives, and though settings are all that it holds; its settings may have been put right."""
        source = network()
        adamw = AdamW(source.parameters())
        train(rotating(source), adamw, range(trained))
        torch._dynamo.reset()

        model = network()
        optimizer = SkewMuon(model.parameters(), **setting)
        compiled = rotating(model)
        if before != "conversion":
            loss(compiled, 0)
        if before == "another step":
            train(compiled, optimizer, range(2))
        states = adamw.state_dict()
        if not with_settings:
            states["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(states)
        old = values(model)
        loss(compiled, 2).backward()
        if trained or with_settings:
            with pytest.raises(PoetxError, match=r"the state of '0\.weight' is another optimizer's"):
                optimizer.step()
            exact(values(model), old)
        else:  # nothing of AdamW's is left
            optimizer.step()
            assert not torch.equal(model[0].weight, old[0])

    def test_settings_of_muon_where_no_rotation_moves(self) -> None:
        model = network()
        muon, optimizer = torch.optim.Muon([model[2].weight]), SkewMuon([model[2].weight])
        optimizer.add_param_group({"params": [model[0].weight]})
        muon.add_param_group({"params": [model[0].weight]})
        loss(rotating(model, exclude=["2"]), 0).backward()
        model[0].weight.grad = None
        old = values(model)
        optimizer.load_state_dict(muon.state_dict())
        with pytest.raises(PoetxError, match="the settings of parameter group 0 are another optimizer's"):
            optimizer.step()
        exact(values(model), old)

    def test_settings_of_muon(self) -> None:
        model = network()
        muon, optimizer = torch.optim.Muon([model[0].weight]), SkewMuon([model[0].weight])
        optimizer.load_state_dict(muon.state_dict())
        compiled, old = rotating(model, exclude=["2"]), values(model)
        loss(compiled, 0).backward()
        with pytest.raises(PoetxError, match="is another optimizer's"):
            optimizer.step()
        exact(values(model), old)

    def test_adamw_refuses_its_state(self) -> None:
        model = network()
        muon, optimizer = SkewMuon(model.parameters()), AdamW(model.parameters())
        compiled = rotating(model)
        train(compiled, muon, range(2))
        optimizer.load_state_dict(muon.state_dict())
        old = values(model)
        loss(compiled, 2).backward()
        with pytest.raises(PoetxError, match=r"the state of '0\.weight' is another optimizer's, and AdamW cannot go on"):
            optimizer.step()
        exact(values(model), old)
        assert optimizer.param_groups[0]["params"][0] is model[0].weight

    def test_prepare_takes_it(self) -> None:
        model = network()
        options = {"block_size": 16, "chunk": 4}
        prepare(model, torch.randn(8, 22, dtype=torch.float64), optimizer=SkewMuon(model.parameters()), options=options)
        factor_of(model[0].weight)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-15, 1e-3, 1e15])
def test_blocks_of_any_size_stay_finite(size: float) -> None:
    upper = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).triu(1)
    turned = orthogonalize_skew((upper - upper.mT) * size)
    assert turned.isfinite().all()
    torch.testing.assert_close(turned, -turned.mT, rtol=0, atol=0)


def test_what_would_rise_is_refused() -> None:
    with pytest.raises(PoetxError, match="does not take maximize=True"):
        SkewMuon([{"params": [nn.Parameter(torch.ones(2))], "maximize": True}])
