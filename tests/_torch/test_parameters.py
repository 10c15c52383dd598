"""What the package does to ``nn.Parameter``, and asks of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Compiled
from torch import Tensor, fx, nn

from poetx_compile._torch.parameters import (
    gradient_hooks,
    hide_from_fakes,
    modules_with,
    notice_changed,
    own_grad,
    own_operations,
    replace_grad_attribute,
    set_own_grad,
    trace_as_parameter,
    under_functorch,
)


@pytest.fixture
def original_grad() -> Iterator[None]:
    """Puts back whatever ``nn.Parameter.grad`` was."""
    before = vars(nn.Parameter).get("grad")
    yield
    if before is not None:
        nn.Parameter.grad = before
    elif "grad" in vars(nn.Parameter):
        del nn.Parameter.grad


def test_a_fake_copy_has_no_gradient_where_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode, meta_utils

    monkeypatch.setattr(meta_utils, "safe_grad", meta_utils.safe_grad)
    shown, hidden = (nn.Parameter(torch.ones(2)) for _ in range(2))
    (shown + hidden).sum().backward()
    hide_from_fakes(lambda tensor: tensor is hidden)
    mode = FakeTensorMode()
    assert mode.from_tensor(shown).grad.shape == (2,)
    assert mode.from_tensor(hidden).grad is None
    assert hidden.grad is not None


@pytest.mark.usefixtures("original_grad")
def test_own_grad_is_autograds_whatever_the_attribute_shows() -> None:
    shown = torch.full((2,), 7.0)
    written: list[Tensor | None] = []
    replace_grad_attribute(lambda parameter: shown, lambda parameter, grad: written.append(grad))
    parameter = nn.Parameter(torch.ones(2))
    parameter.square().sum().backward()
    assert parameter.grad is shown
    own = own_grad(parameter)
    assert own is not None
    assert own.tolist() == [2, 2]

    parameter.grad = own
    del parameter.grad
    assert written == [own, None]

    set_own_grad(parameter, None)
    assert own_grad(parameter) is None
    set_own_grad(parameter, torch.zeros(2))
    assert torch.equal(own_grad(parameter), torch.zeros(2))


@pytest.mark.usefixtures("original_grad")
def test_a_replaced_attribute_reaches_every_parameter_and_no_other_tensor() -> None:
    before = nn.Parameter(torch.ones(1))
    replace_grad_attribute(lambda parameter: torch.full((1,), 7.0), lambda parameter, grad: None)
    assert type(before) is nn.Parameter
    assert before.grad is not None
    assert torch.ones(1, requires_grad=True).grad is None


class Doubled(nn.Parameter):
    """A parameter that every operation sees doubled."""

    @classmethod
    @torch._dynamo.disable
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with own_operations():
            if func is F.linear:
                args = (args[0], args[1] * 2, *args[2:])
            return func(*args, **kwargs or {})


@pytest.fixture
def traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.variables import builder

    monkeypatch.setattr(builder, "infer_subclass_type", builder.infer_subclass_type)
    trace_as_parameter(Doubled)


@pytest.fixture
def doubled(traceable: None) -> nn.Linear:
    layer = nn.Linear(3, 4, bias=False)
    layer.weight.__class__ = Doubled
    return layer


@pytest.mark.parametrize("wrap", [lambda backend: backend, lambda backend: functools.partial(backend)])
def test_a_backend_that_takes_stand_ins_gets_them_as_parameters(doubled: nn.Linear, wrap: Callable[[Any], Any]) -> None:
    seen: list[list[Any]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        seen.append([*inputs, *(node.target for node in gm.graph.nodes)])
        return gm.forward

    backend.takes_stand_ins = True  # type: ignore[attr-defined]
    run = torch.compile(doubled, backend=wrap(backend), fullgraph=True)
    for _ in range(3):
        run(torch.ones(2, 3))
    assert len(seen) == 1
    assert any(value is doubled.weight for value in seen[0])
    assert F.linear in seen[0]


def test_another_backend_runs_what_the_class_says(doubled: nn.Linear) -> None:
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert torch.equal(torch.compile(doubled, backend="aot_eager")(x), doubled(x))


@pytest.mark.usefixtures("traceable")
def test_a_parameter_that_loses_its_memory_recompiles_once() -> None:
    seen = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        seen.append(gm)
        return gm.forward

    backend.takes_stand_ins = True  # type: ignore[attr-defined]
    layer = nn.Linear(3, 4)
    run = torch.compile(layer, backend=backend)
    for step in range(5):
        run(torch.ones(2, 3))
        if step == 1:
            layer.weight.data = torch.zeros(()).expand(4, 3)
            layer.weight.__class__ = Doubled
            notice_changed([layer.weight])
    assert len(seen) == 2
    assert isinstance(layer.weight, Doubled)


def test_transforms_are_noticed() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(under_functorch()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(under_functorch()) or x)(torch.ones(()))
    seen.append(under_functorch())
    assert seen == [True, True, False]


def test_gradient_hooks_are_counted_and_forgotten() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert gradient_hooks(parameter) == 0
    first = parameter.register_hook(lambda grad: grad)
    second = parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    parameter.register_hook(lambda grad: grad)
    assert gradient_hooks(parameter) == 3
    first.remove()
    second.remove()
    assert gradient_hooks(parameter) == 1


def test_modules_that_hold_a_parameter_are_found_with_those_that_hold_them() -> None:
    inner, other = nn.Linear(2, 3), nn.Linear(2, 3)
    outer = nn.Sequential(inner, nn.ReLU())
    assert {id(module) for module in modules_with([inner.bias])} == {id(inner), id(outer)}
    assert {id(module) for module in modules_with([other.bias])} == {id(other)}


def test_modules_that_hold_a_parameter_are_found_whatever_their_own_methods_take() -> None:
    class Grouped(nn.Linear):
        def parameters(self, group: str) -> Iterator[nn.Parameter]:  # type: ignore[override]
            return super().parameters()

    grouped = Grouped(2, 2)
    assert [id(module) for module in modules_with([grouped.bias])] == [id(grouped)]
