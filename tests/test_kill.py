"""``SIGKILL`` at random moments, many times in a row: a run with atomic checkpoints ends with the bits of one never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from killed import COMPILING, SAVING, STEPPING

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
KILLS = 50


def test_a_run_killed_fifty_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    fell = json.loads(done.stdout)
    assert sum(fell.values()) == KILLS
    assert fell[STEPPING] >= 5 and fell[SAVING] >= 5, f"kills must fall everywhere: {fell}"
    assert fell[COMPILING] >= 1
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    exact(killed, whole)
