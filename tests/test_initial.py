"""``init="row-normalised"``: what it does to weights, and that it never touches what was learnt."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import Experts, factor_of, loss, network, rotating, train, values
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW

from poetx_compile import PoetxError, prepare, report, restore
from poetx_compile.initial import normalise_rows
from poetx_compile.registry import factors

INIT: dict[str, Any] = {"init": "row-normalised"}


def norms(weight: Tensor, dim: int = 1) -> Tensor:
    return weight.detach().double().norm(dim=dim)


def check_ones(norms: Tensor) -> None:
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class TestValues:
    @given(
        m=st.integers(1, 9),
        n=st.integers(1, 9),
        outputs=st.integers(0, 1),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        zero=st.booleans(),
    )
    def test_each_output_has_norm_one_and_keeps_its_direction(
        self, m: int, n: int, outputs: int, dtype: torch.dtype, zero: bool
    ) -> None:
        weight = nn.Parameter(torch.randn(m, n, dtype=torch.float64).to(dtype))
        if zero:
            weight.data.select(outputs, 0).zero_()
        before = weight.detach().double()
        normalise_rows(weight, "w", outputs)
        sizes = before.norm(dim=1 - outputs, keepdim=True)
        expected = before / sizes.where(sizes > 0, 1)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)

    def test_a_linear_layer_and_a_product_with_the_weight_on_the_right(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(32, 48)
                self.weight = nn.Parameter(torch.randn(48, 32))

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x).tanh() @ self.weight

        model = Both()
        bias = model.fc.bias.detach().clone()
        compiled = rotating(model, **INIT)
        x = torch.randn(8, 32)
        out = compiled(x)
        check_ones(norms(model.fc.weight))
        check_ones(norms(model.weight, 0))
        assert torch.equal(model.fc.bias, bias)
        torch.testing.assert_close(out, model(x))
        assert str(report(model, show=False)).count("rows normalised at the start") == 2

    def test_weights_whose_outputs_are_not_known_keep_theirs(self) -> None:
        model = Experts()
        before = values(model)
        x = torch.randn(8, 22, dtype=torch.float64)
        rotating(model, include_conv=True, **INIT)(x)
        factor_of(model.experts)
        assert all(torch.equal(now, old) for now, old in zip(values(model), before))
        assert "start kept" in str(report(model, show=False))

    def test_not_by_default(self) -> None:
        model = network()
        before = values(model)
        loss(rotating(model), 0)
        assert all(torch.equal(now, old) for now, old in zip(values(model), before))
        assert "start" not in str(report(model, show=False))

    def test_by_prepare_and_for_a_second_instance_of_compiled_code(self) -> None:
        model = network()
        options = {"block_size": 16, "chunk": 4, **INIT}
        prepare(model, torch.randn(8, 22, dtype=torch.float64), options=options)
        check_ones(norms(model[0].weight))

        blocks = [Layer() for _ in range(2)]
        for block in blocks:
            block.compile(backend="poetx", options={"inner": "aot_eager", "block_size": 16, **INIT})
        x = torch.randn(4, 32)
        for block in blocks:
            x = block(x)
        for block in blocks:
            check_ones(norms(block.fc.weight))


@pytest.mark.parametrize("held", [slice(None), slice(0, 2)], ids=["of a kind that cannot", "that holds one of two"])
def test_an_optimizer_that_is_refused_leaves_the_start_as_it_is(held: slice) -> None:
    model = network()
    before, parameters = values(model), list(model.parameters())[held]
    trainer = torch.optim.LBFGS(parameters) if held == slice(None) else AdamW(parameters)
    with pytest.raises(PoetxError, match=r"LBFGS cannot train|'2\.weight' would be converted, but AdamW does not hold it"):
        prepare(
            model, torch.randn(8, 22, dtype=torch.float64), optimizer=trainer, options={"block_size": 16, "chunk": 4, **INIT}
        )
    assert all(torch.equal(now, then) for now, then in zip(values(model), before))
    assert not any(factors.of_weight(weight) for weight in model.parameters())


class TestWhatWasLearntStays:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_resumed_run_goes_on_exactly(self, dtype: torch.dtype) -> None:
        model = network(dtype)
        optimizer = AdamW(model.parameters(), lr=0.01)
        compiled = rotating(model, **INIT)
        train(compiled, optimizer, range(3))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        train(compiled, optimizer, range(3, 6))

        torch._dynamo.reset()
        file.seek(0)
        weights, states = torch.load(file)
        resumed = network(dtype)
        restarted = AdamW(resumed.parameters(), lr=0.01)
        resumed.load_state_dict(weights)
        restarted.load_state_dict(states)
        train(rotating(resumed, **INIT), restarted, range(3, 6))
        assert all(torch.equal(now, then) for now, then in zip(values(resumed), values(model)))
        assert "start kept" in str(report(resumed, show=False))

    def test_a_model_that_was_restored_and_compiled_again(self) -> None:
        model = network()
        train(rotating(model, **INIT), AdamW(model.parameters(), lr=0.01), range(2))
        restore(model)
        torch._dynamo.reset()
        before = values(model)
        loss(rotating(model, **INIT), 0)
        assert all(torch.equal(now, old) for now, old in zip(values(model), before))

    def test_a_weight_that_thaws_while_others_rotate(self) -> None:
        model = network()
        model[0].weight.requires_grad_(False)
        compiled, optimizer = rotating(model, **INIT), AdamW(model.parameters(), lr=0.01)
        train(compiled, optimizer, range(2))
        before = values(model)
        model[0].weight.requires_grad_(True)
        loss(compiled, 2)
        assert factor_of(model[0].weight)
        assert all(torch.equal(now, old) for now, old in zip(values(model), before))

    def test_a_model_that_an_optimizer_trained_before_is_refused(self) -> None:
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01)
        train(model, optimizer, range(1))
        before = values(model)
        with pytest.raises(Exception, match=r"'0\.weight' was trained by AdamW before.*for pretraining from scratch"):
            loss(rotating(model, **INIT), 0)
        assert all(torch.equal(now, old) for now, old in zip(values(model), before))

    def test_state_that_arrives_after_the_weights_were_rescaled_is_refused(self) -> None:
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01)
        train(rotating(model, **INIT), optimizer, range(2))
        weights, states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        torch._dynamo.reset()
        resumed = network()
        resumed.load_state_dict(weights)
        compiled, restarted = rotating(resumed, **INIT), AdamW(resumed.parameters(), lr=0.01)
        loss(compiled, 9)
        restarted.load_state_dict(states)
        with pytest.raises(PoetxError, match=r"loaded after .* had rescaled its weights: load .* before the first forward"):
            loss(compiled, 2)
        resumed.load_state_dict(weights)  # both loaded: all is well
        train(compiled, restarted, range(2, 4))
        train(rotating(model, **INIT), optimizer, range(2, 4))
        assert all(torch.equal(now, then) for now, then in zip(values(resumed), values(model)))

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(Exception, match="option 'init' must be one of keep, row-normalised, not 'rows'"):
            loss(rotating(network(), init="rows"), 0)
