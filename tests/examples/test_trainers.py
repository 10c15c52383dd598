"""The recipes for trainers: each rotates, learns, and goes on from a checkpoint as if it had never stopped, bit for bit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import poetx_compile

exact = partial(torch.testing.assert_close, rtol=0, atol=0)

RECIPES = {
    "plain": None,
    "with_accelerate": "accelerate",
    "with_transformers": "accelerate",
    "with_lightning": "lightning",
    "with_trl": "trl",
}
FOLDER = Path(__file__).parents[2] / "examples" / "trainers"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    toy = importlib.import_module("toy")
    monkeypatch.setitem(toy.OPTIONS, "inner", "aot_eager")
    yield toy
    for name in ("toy", *RECIPES):
        sys.modules.pop(name, None)


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, toy: ModuleType) -> ModuleType:
    if RECIPES[request.param] is not None:
        pytest.importorskip(RECIPES[request.param])
    return importlib.import_module(request.param)


def forget_accelerators() -> None:
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def held_out_loss(toy: ModuleType, model: nn.Module) -> float:
    plain = toy.build().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(torch.stack([plain(**{k: v[None] for k, v in row.items()}).loss for row in toy.HELD_OUT]).mean())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_resumed_is_uninterrupted(recipe: ModuleType, toy: ModuleType, tmp_path: Path) -> None:
    runs = []
    for name in ("whole", "resumed"):
        forget_accelerators()
        torch._dynamo.reset()
        (checkpoint,) = (tmp_path / "whole").glob(f"checkpoint-{2 * toy.SAVE_EVERY}*") if runs else [None]
        runs.append(recipe.train(tmp_path / name, checkpoint))
        torch.manual_seed(len(runs))  # nothing may hang on what the run before left
    whole, resumed = runs
    start = toy.build()
    exact(resumed.state_dict(), whole.state_dict())
    report = poetx_compile.report(resumed, show=False)
    assert sum(row.converted for row in report.rows) == 7
    weight = whole.model.layers[0].mlp.up_proj.weight
    before = start.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, before)
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(before), rtol=1e-5, atol=0)
    assert held_out_loss(toy, whole) < held_out_loss(toy, start) - 1


def test_accelerate_takes_no_backend_by_its_name(toy: ModuleType) -> None:
    """Why the recipes compile by themselves. Should this fail, ``torch_compile_backend="poetx"`` works: say so in docs."""
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        Accelerator(dynamo_backend="poetx", cpu=True)
