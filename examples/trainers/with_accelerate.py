"""accelerate: compile the model, then prepare it. ``Accelerator(dynamo_backend=...)`` knows a fixed list of names only.

accelerate launch --num_processes 2 examples/trainers/with_accelerate.py
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import toy
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, default_collate

import poetx_compile


def train(out: Path, resume: Path | None = None) -> nn.Module:
    accelerator = Accelerator(
        gradient_accumulation_steps=toy.ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        cpu=not torch.cuda.is_available(),
    )
    set_seed(0)
    model = toy.build()
    if accelerator.num_processes > 1:  # accelerate will wrap it in DistributedDataParallel, which must find it converted
        model.to(accelerator.device)
        batch = default_collate([toy.TRAINING[0]])
        poetx_compile.prepare(model, **{k: v.to(accelerator.device) for k, v in batch.items()}, options=toy.OPTIONS)
    compiled = torch.compile(model, backend="poetx", options=toy.OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, toy.STEPS)
    batches, held_out = toy.loader(toy.TRAINING, shuffle=True), toy.loader(toy.HELD_OUT)
    compiled, optimizer, scheduler, batches, held_out = accelerator.prepare(
        compiled, optimizer, scheduler, batches, held_out
    )
    steps_per_epoch = math.ceil(len(batches) / toy.ACCUMULATE)  # accelerate steps at the end of an epoch, full or not
    done = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        done = int(resume.name.rpartition("-")[2])

    while done < toy.STEPS:
        epoch, skipped = divmod(done, steps_per_epoch)
        batches.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(batches, skipped * toy.ACCUMULATE):
            with accelerator.accumulate(compiled):
                accelerator.backward(compiled(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(compiled.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            if done % toy.EVALUATE_EVERY == 0:
                accelerator.print(f"step {done}: held-out loss {evaluate(compiled, held_out):.3f}")
            if done % toy.SAVE_EVERY == 0:
                accelerator.save_state(str(out / f"checkpoint-{done}"))
            if done == toy.STEPS:
                break
    return model


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    losses = [model(**batch).loss for batch in batches]
    model.train()
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    toy.main(train)
