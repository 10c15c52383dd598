"""``W.grad`` is ``q.grad``: everything a script does with a weight's gradient, it does with that of the rotation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import Explicit, factor_of, loss, network, rotating, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

OPTIONS = {"block_size": 16, "chunk": 4, "inner": "aot_eager"}

close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


class Training:
    """A converted network, held by an optimizer, before its first backward pass."""

    def __init__(self, **options: object) -> None:
        self.model = network()
        self.explicit = Explicit(self.model, **options)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.1)
        self.compiled = rotating(self.model, **options)
        loss(self.compiled, 0)
        self.weight = self.model[0].weight
        self.factor = factor_of(self.weight)

    def grads(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.model.parameters()]

    def expected(self, *steps: int) -> list[Tensor | None]:
        """Gradients of all parameters of the explicit parametrisation, by autograd."""
        for parameter in self.explicit.parameters():
            parameter.grad = None
        for step in steps:
            loss(self.explicit, step).backward()
        return [parameter.grad for parameter in self.explicit.parameters()]


@pytest.mark.parametrize("route", ["gram", "dense"])
@settings(max_examples=8)
@given(steps=st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=4))
def test_it_sums_over_micro_batches_compiled_or_not(route: str, steps: list[tuple[int, bool]]) -> None:
    training = Training(route=route)
    for step, eager in steps:
        loss(training.model if eager else training.compiled, step).backward()
    close(training.grads(), training.expected(*(step for step, _ in steps)))


def test_it_is_the_gradient_of_q() -> None:
    training = Training()
    assert training.weight.grad is None
    loss(training.compiled, 0).backward()
    assert training.weight.grad is training.factor.q.grad
    assert training.weight.grad.shape == training.factor.q.shape


def test_autograd_keeps_no_dense_gradient_of_the_weight() -> None:
    training = Training()
    loss(training.model, 0).backward()
    assert torch.Tensor.grad.__get__(training.weight) is None  # type: ignore[attr-defined]


def test_writing_through_it_changes_what_the_optimizer_sees() -> None:
    training = Training()
    loss(training.compiled, 0).backward()
    training.weight.grad.clamp_(-0.01, 0.01)
    assert training.factor.q.grad.abs().max() == 0.01
    training.weight.grad *= 2
    assert training.factor.q.grad.abs().max() == 0.02


def test_it_can_be_taken_away() -> None:
    training = Training()
    loss(training.compiled, 0).backward()
    training.weight.grad = None
    assert training.factor.q.grad is None
    loss(training.compiled, 0).backward()
    del training.weight.grad
    assert training.factor.q.grad is None
    loss(training.compiled, 1).backward()
    close(training.grads()[0], training.expected(1)[0])


def test_a_packed_gradient_can_be_assigned() -> None:
    training = Training()
    packed = torch.randn_like(training.factor.q)
    training.weight.grad = packed
    assert training.factor.q.grad is packed


def test_a_gradient_of_the_weights_shape_is_projected_when_assigned() -> None:
    training = Training()
    plain = network()
    loss(plain, 3).backward()
    training.weight.grad = plain[0].weight.grad
    close(training.weight.grad, training.expected(3)[0])


def test_a_gradient_of_any_other_shape_is_refused() -> None:
    training = Training()
    with pytest.raises(RuntimeError, match="size"):
        training.weight.grad = torch.ones(7, dtype=torch.float64)
    assert training.weight.grad is None


def test_one_that_was_there_before_conversion_counts() -> None:
    model = network()
    explicit = Explicit(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss(model, 0).backward()
    assert model[0].weight.grad.shape == model[0].weight.shape
    loss(rotating(model), 1).backward()
    for step in (0, 1):
        loss(explicit, step).backward()
    held = optimizer.param_groups[0]["params"]
    close([p.grad for p in held], [p.grad for p in explicit.parameters()])


def test_ordinary_parameters_keep_their_own() -> None:
    training = Training()
    loss(training.compiled, 0).backward()
    plain = network()
    loss(plain, 0).backward()
    close([training.model[0].bias.grad, training.model[3].weight.grad], [plain[0].bias.grad, plain[3].weight.grad])

    stranger = nn.Parameter(torch.ones(3))
    (stranger**2).sum().backward()
    exact(stranger.grad, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="size"):
        stranger.grad = torch.ones(4)
    del stranger.grad
    assert stranger.grad is None


def test_compiled_code_can_read_it() -> None:
    training = Training()
    loss(training.compiled, 0).backward()

    @torch.compile(backend="aot_eager")
    def norms(model: nn.Module) -> Tensor:
        return torch.stack([parameter.grad.norm() for parameter in model.parameters()])

    close(norms(training.model), torch.stack([grad.norm() for grad in training.grads()]))


@pytest.mark.parametrize(
    ("dtype", "storage"), [(torch.float64, "folded"), (torch.bfloat16, "folded"), (torch.bfloat16, "int8")], ids=str
)
def test_a_compiled_step_clips_halves_and_clears_it_as_a_loop_does(dtype: torch.dtype, storage: str) -> None:
    options = OPTIONS | {"storage": storage}
    moves = []
    for outer in (lambda step: step, torch.compile(backend="aot_eager"), torch.compile(backend="poetx", options=options)):
        torch._dynamo.reset()
        model = network(dtype)
        start = torch.cat([value.flatten().double() for value in values(model)])
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        loss(rotating(model, storage=storage), 0, dtype)

        def step(x: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model.zero_grad()
            model(x).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
            optimizer.step()

        whole = outer(step)
        for seed in range(3):
            whole(torch.randn(8, 22, generator=torch.Generator().manual_seed(seed)).to(dtype))
        moves.append(torch.cat([value.flatten().double() for value in values(model)]) - start)
    for move in moves[1:]:
        assert (move - moves[0]).norm() <= (1e-10 if dtype == torch.float64 else 0.1) * moves[0].norm()


def test_a_copy_of_the_weight_has_one_of_its_own() -> None:
    training = Training()
    loss(training.compiled, 0).backward()
    copy = nn.Parameter(training.weight.detach().clone())
    copy.grad = torch.ones_like(copy)
    assert copy.grad.shape == copy.shape
    assert training.weight.grad.shape == training.factor.q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_float32_for_half_precision_weights(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compiled = rotating(model)
    for net in (compiled, model):
        loss(net, 0, dtype).backward()
        assert model[0].weight.grad.dtype == torch.float32
        assert model[0].bias.grad.dtype == dtype
        optimizer.zero_grad()


@pytest.mark.parametrize("storage", ["folded", "int8"])
def test_it_outlives_a_move_to_the_dtype_that_the_model_has(storage: str) -> None:
    """torch moves a gradient by writing its ``.data``, and that of a rotation is float32."""
    model = network(torch.bfloat16)
    optimizer = optim.SGD(model.parameters())
    compiled = rotating(model, storage=storage)
    loss(compiled, 0, torch.bfloat16).backward()
    q = factor_of(model[0].weight).q
    expected = q.grad.bfloat16().float()
    model.to(torch.bfloat16)
    torch._dynamo.reset()  # the next forward compiles, and copies gradients
    result = loss(compiled, 1, torch.bfloat16)
    assert torch.equal(q.grad, expected)
    result.backward()
    assert not torch.equal(q.grad, expected)
    assert q.grad.dtype == torch.float32
    optimizer.zero_grad()
