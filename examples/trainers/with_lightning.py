"""Lightning: compile the network inside the LightningModule, in place.

Lightning saves no random numbers, so the module does; and it starts the epoch's loader anew on resuming, so checkpoints
fall on ends of epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import toy
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = toy.build()
        self.network.compile(backend="poetx", options=toy.OPTIONS)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(**batch).loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("held-out loss", self.network(**batch).loss, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=toy.RATE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, toy.STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint["random"]

    def on_train_start(self) -> None:
        if hasattr(self, "random"):
            torch.set_rng_state(self.random)


def train(out: Path, resume: Path | None = None) -> nn.Module:
    module = Module()
    save = ModelCheckpoint(
        out, "checkpoint-{step}", every_n_train_steps=toy.SAVE_EVERY, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=toy.STEPS,
        accumulate_grad_batches=toy.ACCUMULATE,
        gradient_clip_val=1.0,
        val_check_interval=toy.EVALUATE_EVERY * toy.ACCUMULATE,
        check_val_every_n_epoch=None,
        callbacks=[save],
        logger=False,
    )
    epoch = toy.Text(range(toy.SAVE_EVERY * toy.ACCUMULATE * toy.BATCH))
    trainer.fit(module, toy.loader(epoch), toy.loader(toy.HELD_OUT), ckpt_path=resume)
    return module.network


if __name__ == "__main__":
    toy.main(train)
