"""transformers.Trainer: compile the model in place. ``torch_compile_backend`` knows accelerate's list of names only."""

from __future__ import annotations

from pathlib import Path

import torch
import toy
from torch import nn
from transformers import Trainer, TrainingArguments


def train(out: Path, resume: Path | None = None) -> nn.Module:
    model = toy.build()
    model.compile(backend="poetx", options=toy.OPTIONS)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=toy.STEPS,
        per_device_train_batch_size=toy.BATCH,
        gradient_accumulation_steps=toy.ACCUMULATE,
        learning_rate=toy.RATE,
        eval_strategy="steps",
        eval_steps=toy.EVALUATE_EVERY,
        save_steps=toy.SAVE_EVERY,
        logging_steps=toy.EVALUATE_EVERY,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=toy.TRAINING, eval_dataset=toy.HELD_OUT)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


if __name__ == "__main__":
    toy.main(train)
