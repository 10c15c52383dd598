"""``torchrun accelerated.py FOLDER [CHECKPOINT]``: the recipe for accelerate, each of whose ranks writes what it ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import toy
import with_accelerate
from torch import distributed

toy.OPTIONS |= {"inner": "aot_eager", "permutation_period": 5}


def main(out: Path, resume: Path | None) -> None:
    model = with_accelerate.train(out, resume)
    torch.save(model.state_dict(), out / f"rank-{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
