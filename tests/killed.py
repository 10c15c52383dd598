"""A training script that is killed again and again: ``python killed.py FOLDER KILLS SEED``.

A warm process forks each life of the script, so that a life costs a compilation and no imports, and kills it by SIGKILL
at a random moment: while it compiles, steps or saves. The last life runs to the end. So does one that nothing interrupts,
in a folder of its own. Prints where the kills fell.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from helpers import loss, network, rotating
from torch import nn

STEPS = 300
SAVE_EVERY = 2
COMPILING, STEPPING, SAVING = "compiling", "stepping", "saving"
PHASES = {b"t": STEPPING, b"s": SAVING}
KILLED_WHILE_COMPILING = 0.1


def script(folder: Path, tell: int) -> None:
    """Train to the end from the newest checkpoint, with all that makes resuming hard: residuals, redraws, dropout."""
    model = nn.Sequential(*network(torch.bfloat16), nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    path, temporary = folder / "checkpoint.pt", folder / "checkpoint.tmp"
    first = 0
    if path.exists():
        content = torch.load(path, weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
        torch.set_rng_state(content["random"])
        first = content["step"]
    compiled = rotating(model, permutation_period=5)
    for step in range(first, STEPS):
        loss(compiled, step, torch.bfloat16).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == first:
            os.write(tell, b"t")
        if (step + 1) % SAVE_EVERY == 0:
            os.write(tell, b"s")
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "step": step + 1,
            }
            torch.save(content, temporary)
            temporary.replace(path)
            os.write(tell, b"t")


def live(folder: Path, delay: float | None = None, during_compilation: bool = False) -> tuple[str | None, float]:
    """One life of the script, killed ``delay`` seconds after it starts, or after its first step.

    Returns:
        What it was doing when it was killed, None if it came to its end; and the seconds since its first step.
    """
    listen, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(listen)
        try:
            script(folder, tell)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(tell)
    phase = COMPILING
    if not during_compilation:
        phase = PHASES.get(os.read(listen, 1), phase)
    started = time.perf_counter()
    if delay is not None:
        select.select([], [], [], delay)
        os.kill(child, signal.SIGKILL)
    while heard := os.read(listen, 1 << 12):
        phase = PHASES[heard[-1:]]
    os.close(listen)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return phase, time.perf_counter() - started
    if status:
        sys.exit("a life of the script failed")
    return None, time.perf_counter() - started


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rotating(nn.Linear(16, 16))(torch.ones(1, 16))  # loads the compiler, once for all lives
    torch._dynamo.reset()
    chance = random.Random(seed)
    for name in ("whole", "killed"):
        (root / name).mkdir()
    _, seconds = live(root / "whole")
    longest = seconds / (1.5 * kills)  # so that about a third of all steps is made before the last life
    fell: Counter[str] = Counter()
    while fell.total() < kills:
        early = chance.random() < KILLED_WHILE_COMPILING
        phase, _ = live(root / "killed", chance.uniform(0, longest), early)
        if phase is None:
            sys.exit(f"the script came to its end after {fell.total()} kills")
        fell[phase] += 1
    live(root / "killed")
    print(json.dumps(fell))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
