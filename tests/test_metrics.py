"""What :class:`poetx_compile.Metrics` says is what happened, and asking changes nothing."""

from __future__ import annotations

import copy
import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import factor_of, loss, network, rotating, train, values
from torch import optim

from poetx_compile import Metrics, kernels, metrics

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
NAMES = ("0.weight", "2.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_watching_changes_nothing(dtype: torch.dtype) -> None:
    trained = []
    for watch in (False, True):
        model = network(dtype)
        watching = Metrics(model) if watch else None
        train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(3))
        trained.append(values(model))
        assert watching is None or watching.last
    exact(*trained)


def test_numbers_of_a_step() -> None:
    model = network()
    compiled = rotating(model, scale=0.5)
    watching = Metrics(compiled)
    assert watching.last == {}
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    loss(compiled, 0).backward()
    gradients = {name: model.get_parameter(name).grad.clone() for name in NAMES}
    optimizer.step()
    last = watching.last
    for name in NAMES:
        factor = factor_of(model.get_parameter(name))
        assert last[f"poetx/tangent/{name}"] == pytest.approx(float(gradients[name].norm()))
        assert 0 <= last[f"poetx/orthogonality/{name}"] < 1e-14
        planes = factor.rows.rotated + factor.columns.rotated
        angle = 2 * 0.5 * 0.01 * float(gradients[name].norm()) * (2 / planes) ** 0.5
        assert last[f"poetx/angle/{name}"] == pytest.approx(angle)
    assert last["poetx/retraction_seconds"] > 0
    assert last["poetx/rotation_bytes"] == 8 * sum(grad.numel() for grad in gradients.values())
    assert last["poetx/residual_bytes"] == 0


def test_angle_is_that_of_the_rotations_that_were_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plane that turns by a small angle contributes its square twice to the squared norm of G - I."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 32, bias=False)).double()
    folded = []
    make = kernels.cayley_neumann
    monkeypatch.setattr(kernels, "cayley_neumann", lambda *args: folded.append(make(*args)) or folded[-1])
    compiled = rotating(model)
    watching = Metrics(model)
    compiled(torch.ones(4, 24, dtype=torch.float64)).square().sum().backward()
    optim.SGD(model.parameters(), lr=1e-5).step()
    squares = sum(float(turn.square().sum()) for turn in folded)
    channels = sum(turn.shape[0] * turn.shape[1] for turn in folded)
    assert watching.last["poetx/angle/0.weight"] == pytest.approx((squares / channels) ** 0.5, rel=1e-3)


def test_spectrum_drift_tells_of_foreign_writes() -> None:
    model = network()
    compiled = rotating(model)
    watching = Metrics(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    loss(compiled, 0)
    assert set(watching.spectrum_drift().values()) == {0.0}
    train(compiled, optimizer, range(3))
    assert max(watching.spectrum_drift().values()) < 1e-13
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    drift = watching.spectrum_drift()
    assert drift["poetx/spectrum_drift/0.weight"] == pytest.approx(0.5)
    assert drift["poetx/spectrum_drift/2.weight"] < 1e-13


def test_each_model_has_its_own_until_closed_or_forgotten() -> None:
    model = network()
    twin = copy.deepcopy(model)
    watching, other = Metrics(model), Metrics(twin)
    train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(1))
    assert watching.last and not other.last
    first = watching.last
    watching.close()
    train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(1, 2))
    assert watching.last == first
    del watching, other
    gc.collect()
    assert not metrics._active


# --- Loggers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers() -> dict[str, float]:
    """Of one step."""
    model = network()
    watching = Metrics(model)
    train(rotating(model), optim.AdamW(model.parameters(), lr=0.01), range(1))
    return watching.last


def test_tensorboard_takes_them(numbers: dict[str, float], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == list(numbers)
    for name, value in numbers.items():
        (event,) = events.Scalars(name)
        assert event.step == 3 and event.value == pytest.approx(value)


def test_weights_and_biases_takes_them_offline(numbers: dict[str, float], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True)
    with wandb.init(mode="offline", dir=tmp_path, settings=settings) as run:
        run.log(numbers, step=3, commit=True)
        assert {name: run.summary[name] for name in numbers} == pytest.approx(numbers)
    wandb.teardown()  # its service writes the file to the end
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name, value in numbers.items():
        assert name.encode() in content and str(value).removesuffix(".0").encode() in content, name
