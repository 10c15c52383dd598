"""One of two ranks dies once: torchrun starts both again, and they end with the bits of a run in which none died."""

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


def launch(out: Path, fatal_step: int, restarts: int) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={restarts}", str(HERE / "dying.py"), str(out), str(fatal_step)]
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
        done = launch(out, fatal_step, restarts=1)
        assert done.returncode == 0, done.stderr
    ends = {out: [torch.load(path, weights_only=True) for path in sorted(out.glob("life-*"))] for out in (whole, died)}
    assert [path.name for path in sorted(died.glob("life-*"))] == ["life-1-rank-0.pt", "life-1-rank-1.pt"]
    assert [end["steps"] for end in ends[whole]] == [STEPS] * 2
    assert [end["steps"] for end in ends[died]] == [STEPS - SAVE_EVERY] * 2
    for end in (*ends[whole], *ends[died]):
        exact(end["model"], ends[whole][0]["model"])
    saved = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, died)]
    exact(saved[1], saved[0])
    again = launch(whole, NEVER, restarts=0)  # as after a death between the last checkpoint and the end
    assert again.returncode == 0, again.stderr


def test_without_a_restart_a_death_ends_the_run(tmp_path: Path) -> None:
    done = launch(tmp_path, 7, restarts=0)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == SAVE_EVERY
    assert not list(tmp_path.glob("life-*"))
