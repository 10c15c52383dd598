"""Recipes under torchrun: one of two ranks dies, and both go on; two ranks of accelerate stop, and go on from their checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "examples" / "trainers"
NEVER, STEPS, SAVE_EVERY = 0, 12, 4


def launch(script: str, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={restarts}", str(HERE / script), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(RECIPES), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which hold the pipes too
            pytest.fail(f"not done in 240 seconds: {process.communicate()}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def test_ranks_restarted_after_a_death_end_with_the_same_bits(tmp_path: Path) -> None:
    whole, died = tmp_path / "whole", tmp_path / "died"
    for out, fatal_step in ((whole, NEVER), (died, 7)):
        done = launch("dying.py", out, fatal_step, restarts=1)
        assert done.returncode == 0, done.stderr
    ends = {out: [torch.load(path, weights_only=True) for path in sorted(out.glob("life-*"))] for out in (whole, died)}
    assert [path.name for path in sorted(died.glob("life-*"))] == ["life-1-rank-0.pt", "life-1-rank-1.pt"]
    assert [end["steps"] for end in ends[whole]] == [STEPS] * 2
    assert [end["steps"] for end in ends[died]] == [STEPS - SAVE_EVERY] * 2
    for end in (*ends[whole], *ends[died]):
        exact(end["model"], ends[whole][0]["model"])
    saved = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, died)]
    exact(saved[1], saved[0])
    again = launch("dying.py", whole, NEVER)  # as after a death between the last checkpoint and the end
    assert again.returncode == 0, again.stderr


def test_without_a_restart_a_death_ends_the_run(tmp_path: Path) -> None:
    done = launch("dying.py", tmp_path, 7)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == SAVE_EVERY
    assert not list(tmp_path.glob("life-*"))


def test_ranks_of_accelerate_go_on_from_their_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out, checkpoint in ((whole, []), (resumed, [whole / "checkpoint-8"])):
        out.mkdir()
        done = launch("accelerated.py", out, *checkpoint)
        assert done.returncode == 0, done.stderr
    first, *others = (torch.load(out / f"rank-{rank}.pt", weights_only=True) for out in (whole, resumed) for rank in (0, 1))
    for other in others:
        exact(other, first)
