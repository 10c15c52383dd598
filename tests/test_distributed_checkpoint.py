"""``torch.distributed.checkpoint`` holds the same state, once the model is converted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import OPTIONS, loss, network, rotating, train, values
from torch import nn, optim
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

import poetx_compile

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SETTINGS = {"permutation_period": 3}
DTYPE = torch.bfloat16
Training = tuple[nn.Sequential, optim.Optimizer]


def start() -> Training:
    model = network(DTYPE)
    return model, optim.AdamW(model.parameters(), lr=0.004, eps=1e-3)


def load(training: Training, path: Path) -> None:
    state = dict(zip(("model", "optimizer"), get_state_dict(*training)))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(*training, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def once_prepared(training: Training, path: Path) -> None:
    poetx_compile.prepare(training[0], torch.zeros(8, 22, dtype=DTYPE), options=OPTIONS | SETTINGS)
    load(training, path)


def after_a_forward(training: Training, path: Path) -> None:
    loss(rotating(training[0], **SETTINGS), 77, DTYPE)
    load(training, path)


def after_some_training(training: Training, path: Path) -> None:
    train(rotating(training[0], **SETTINGS), training[1], range(50, 53))
    load(training, path)


def as_one_file_before_the_first_forward(training: Training, path: Path) -> None:
    dcp_to_torch_save(path, path.with_suffix(".pt"))
    state = torch.load(path.with_suffix(".pt"), weights_only=True)
    set_state_dict(*training, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Training]:
    """A checkpoint of four steps, and the training that wrote it four steps later."""
    training = start()
    compiled = rotating(training[0], **SETTINGS)
    train(compiled, training[1], range(4))
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*training))), checkpoint_id=tmp_path / "checkpoint")
    train(compiled, training[1], range(4, 8))
    return tmp_path / "checkpoint", training


@pytest.mark.parametrize(
    "moment", [once_prepared, after_a_forward, after_some_training, as_one_file_before_the_first_forward]
)
def test_resume_is_exact(moment: Callable[[Training, Path], None], saved: tuple[Path, Training]) -> None:
    path, (model, _) = saved
    torch._dynamo.reset()
    resumed = start()
    moment(resumed, path)
    train(rotating(resumed[0], **SETTINGS), resumed[1], range(4, 8))
    exact(values(resumed[0]), values(model))


def refused(training: Training, path: Path, sentence: str) -> None:
    before = values(training[0])
    with pytest.raises(dcp.CheckpointException, match=sentence):
        load(training, path)
    exact(values(training[0]), before)


def test_before_the_first_forward_it_is_refused_and_changes_nothing(saved: tuple[Path, Training]) -> None:
    """torch reads into tensors that stand ready, and nobody knows yet which weights will rotate."""
    training = start()
    rotating(training[0], **SETTINGS)
    refused(
        training, saved[0], r"poetx: this checkpoint holds .* Call poetx_compile\.prepare\(model, batch, options=\.\.\.\)"
    )


def test_other_blocks_are_refused(saved: tuple[Path, Training]) -> None:
    training = start()
    poetx_compile.prepare(training[0], torch.zeros(8, 22, dtype=DTYPE), options=OPTIONS | {"block_size": 8})
    refused(training, saved[0], "with the options of the run that saved it")


def test_state_of_ordinary_training_is_refused(tmp_path: Path) -> None:
    ordinary = start()
    train(ordinary[0], ordinary[1], range(2))
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*ordinary))), checkpoint_id=tmp_path)
    training = start()
    poetx_compile.prepare(training[0], torch.zeros(8, 22, dtype=DTYPE), options=OPTIONS)
    refused(training, tmp_path, "poetx: the optimizer state of this checkpoint comes from ordinary training")
    model_state = {"model": get_model_state_dict(training[0])}
    dcp.load(model_state, checkpoint_id=tmp_path)
    exact(values(training[0]), values(ordinary[0]))


def test_what_has_nothing_to_do_with_rotations_is_torchs_own_to_say(tmp_path: Path) -> None:
    dcp.save({"x": torch.zeros(3)}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Size mismatch between saved") as raised:
        dcp.load({"x": torch.zeros(4)}, checkpoint_id=tmp_path)
    assert "poetx:" not in str(raised.value)
