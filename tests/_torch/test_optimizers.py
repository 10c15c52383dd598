"""Steps of optimizers, and loads of their state."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.optim import SGD, Adam, Optimizer

from poetx_compile._torch.optimizers import (
    explain_failed_loads,
    live_optimizers,
    on_optimizer_state_loaded,
    run_first_after_step,
    steps_running,
)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """Optimizers that received state since the test began."""
    monkeypatch.setattr(Optimizer, "__setstate__", Optimizer.__setstate__)
    noted: list[Optimizer] = []
    on_optimizer_state_loaded(noted.append)
    return noted


def stepped(kind: type[Optimizer] = Adam) -> Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1)  # type: ignore[call-arg]
    parameter.sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_loading_a_state_dict_is_noted(loaded: list[Optimizer], kind: type[Optimizer]) -> None:
    first, second = stepped(kind), stepped(kind)
    assert loaded == []
    second.load_state_dict(first.state_dict())
    assert loaded == [second]


def test_copying_an_optimizer_is_noted(loaded: list[Optimizer]) -> None:
    copied = copy.deepcopy(stepped())
    assert [each is copied for each in loaded] == [True]


def test_unpickling_an_optimizer_is_noted(loaded: list[Optimizer]) -> None:
    unpickled = pickle.loads(pickle.dumps(stepped()))
    assert [each is unpickled for each in loaded] == [True]
    assert unpickled.state_dict()["state"][0]["step"] == 1


def test_noting_changes_nothing_else(loaded: list[Optimizer]) -> None:
    first, second = stepped(), stepped()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["state"][0].keys() == first.state_dict()["state"][0].keys()
    assert Optimizer.__setstate__.__name__ == "__setstate__"


def test_a_distributed_checkpoint_that_does_not_fit_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[set[str], set[str]]] = []

    def explain(saved: set[str], wanted: set[str]) -> str:
        asked.append((saved, wanted))
        return "as it is"

    monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", DefaultLoadPlanner.create_local_plan)
    explain_failed_loads(explain)
    dcp.save({"a": {"x": torch.zeros(3)}}, checkpoint_id=tmp_path)
    dcp.load({"a": {"x": torch.zeros(3)}}, checkpoint_id=tmp_path)
    assert not asked
    for content in ({"x": torch.zeros(4)}, {"y": torch.zeros(3)}):
        with pytest.raises(dcp.CheckpointException, match="PoetxError: as it is"):
            dcp.load({"a": content}, checkpoint_id=tmp_path)
    assert asked == [({"a.x"}, {"a.x"}), ({"a.x"}, {"a.y"})]


def test_a_hook_runs_before_those_of_the_user() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    order: list[str] = []
    optimizer.register_step_post_hook(lambda *args: order.append("user"))
    run_first_after_step(optimizer, lambda *args: order.append("first"))
    optimizer.step()
    assert order == ["first", "user"]


def test_live_optimizers_are_found_until_they_die() -> None:
    optimizer = stepped()
    assert any(each is optimizer for each in live_optimizers())
    identity = id(optimizer)
    del optimizer
    gc.collect()
    assert all(id(each) != identity for each in live_optimizers())


def test_an_optimizer_that_is_being_built_is_not_live() -> None:
    class HalfBuilt(SGD):
        def __init__(self) -> None:
            assert all(each is not self for each in live_optimizers())
            super().__init__([nn.Parameter(torch.ones(1))], lr=0.1)

    HalfBuilt()


def test_steps_running_sees_the_step_of_this_optimizer_only() -> None:
    parameter = nn.Parameter(torch.ones(2))
    first, second = SGD([parameter], lr=0.1), SGD([parameter], lr=0.1)
    seen: list[tuple[int, int]] = []

    def closure() -> float:
        seen.append((steps_running(first), steps_running(second)))
        return 0.0

    first.step(closure)
    second.step(closure)
    closure()
    assert seen == [(1, 0), (0, 1), (0, 0)]


def test_steps_running_counts_the_step_of_the_base_class_too() -> None:
    class Derived(SGD):
        def step(this, closure: Any = None) -> Any:  # noqa: N805 (the name of ``self`` must not matter)
            return super().step(closure)

    seen: list[int] = []
    optimizer = Derived([nn.Parameter(torch.ones(2))], lr=0.1)
    SGD([nn.Parameter(torch.ones(2))], lr=0.1)  # torch hooks a class's step when its first instance is built
    optimizer.register_step_pre_hook(lambda *_: seen.append(steps_running(optimizer)))
    optimizer.step(lambda: seen.append(steps_running(optimizer)))
    assert seen == [1, 2, 2]


def test_steps_running_after_a_step_that_failed() -> None:
    optimizer = stepped(SGD)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert not steps_running(optimizer)
