"""A loop of one's own: accumulation, clipping, evaluation, checkpoints that are whole or not there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import toy
from torch import Tensor, nn


def train(out: Path, resume: Path | None = None) -> nn.Module:
    out.mkdir(parents=True, exist_ok=True)
    model = toy.build()
    compiled = torch.compile(model, backend="poetx", options=toy.OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=toy.RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, toy.STEPS)
    done = 0
    if resume is not None:
        content = torch.load(resume, weights_only=True)
        for name, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["random"])
        done = content["step"]

    batches = itertools.islice(training_batches(), done * toy.ACCUMULATE, None)
    while done < toy.STEPS:
        for batch in itertools.islice(batches, toy.ACCUMULATE):
            loss = compiled(**batch).loss / toy.ACCUMULATE
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done += 1
        if done % toy.EVALUATE_EVERY == 0:
            print(f"step {done}: held-out loss {evaluate(model):.3f}")
        if done % toy.SAVE_EVERY == 0:
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "step": done,
            }
            temporary = out / "checkpoint.tmp"
            torch.save(content, temporary)
            temporary.replace(out / f"checkpoint-{done}")
    return model


def training_batches() -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch, each in an order that depends on its number only."""
    for epoch in itertools.count():
        yield from toy.loader(toy.TRAINING, shuffle=True, seed=epoch)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    model.eval()
    losses = [model(**batch).loss for batch in toy.loader(toy.HELD_OUT)]
    model.train()
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    toy.main(train)
