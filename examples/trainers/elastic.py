"""Several processes under torchrun, which starts all of them again when one dies; they go on from the newest checkpoint.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 examples/trainers/elastic.py

The variable gives each life a store of its own: in a shared one, ranks find the addresses of those that died.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import toy
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import poetx_compile


def train(out: Path, resume: Path | None = None) -> nn.Module:
    """``resume`` is the checkpoint to start from where ``out`` has none yet."""
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"

    model = toy.build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, toy.STEPS)
    done = 0
    if checkpoint.exists() or resume is not None:
        content = torch.load(checkpoint if checkpoint.exists() else resume, map_location=device, weights_only=True)
        for name, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
            part.load_state_dict(content[name])
        done = content["step"]
    poetx_compile.prepare(model, **batch_of(0, device), options=toy.OPTIONS)
    model.compile(backend="poetx", options=toy.OPTIONS)
    wrapped, loss = DistributedDataParallel(model), None

    while done < toy.STEPS:
        torch.manual_seed(done * distributed.get_world_size() + distributed.get_rank())  # dropout, the same in every life
        for micro in range(toy.ACCUMULATE):
            reduced = micro == toy.ACCUMULATE - 1
            with nullcontext() if reduced else wrapped.no_sync():
                loss = wrapped(**batch_of(done * toy.ACCUMULATE + micro, device)).loss / toy.ACCUMULATE
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done += 1
        if done % toy.SAVE_EVERY == 0:
            poetx_compile.check_ranks(model)
            if distributed.get_rank() == 0:
                states = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                content = {name: part.state_dict() for name, part in states.items()}
                temporary = checkpoint.with_suffix(".tmp")
                torch.save(content | {"step": done}, temporary)
                temporary.replace(checkpoint)
    del wrapped, loss  # they must go before the group in which they were reduced: else ranks may wait at their end
    distributed.destroy_process_group()
    return model


def batch_of(number: int, device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's part of one global batch, which depends on its number only."""
    sampler = DistributedSampler(toy.TRAINING, seed=number)
    return {
        name: tensor.to(device) for name, tensor in next(iter(DataLoader(toy.TRAINING, toy.BATCH, sampler=sampler))).items()
    }


if __name__ == "__main__":
    toy.main(train)
