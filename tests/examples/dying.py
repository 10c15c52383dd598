"""``torchrun dying.py FOLDER STEP``: the elastic recipe, of which rank 1 kills itself at one step of its first life."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import elastic
import torch
import toy
from torch.optim.optimizer import register_optimizer_step_post_hook

toy.OPTIONS |= {"inner": "aot_eager", "permutation_period": 5}


def main(out: Path, fatal_step: int) -> None:
    taken = 0

    def count(*args: object) -> None:
        nonlocal taken
        taken += 1
        if taken == fatal_step and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)
    model = elastic.train(out)
    life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    torch.save({"model": model.state_dict(), "steps": taken}, out / f"life-{life}-rank-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
