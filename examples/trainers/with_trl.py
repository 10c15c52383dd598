"""TRL's SFTTrainer: compile the model in place, as for transformers.Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
import toy
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def train(out: Path, resume: Path | None = None) -> nn.Module:
    model = toy.build()
    model.compile(backend="poetx", options=toy.OPTIONS)
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=toy.STEPS,
        max_length=toy.LENGTH,
        per_device_train_batch_size=toy.BATCH,
        gradient_accumulation_steps=toy.ACCUMULATE,
        learning_rate=toy.RATE,
        eval_strategy="steps",
        eval_steps=toy.EVALUATE_EVERY,
        save_steps=toy.SAVE_EVERY,
        logging_steps=toy.EVALUATE_EVERY,
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=texts(toy.TRAINING),
        eval_dataset=texts(toy.HELD_OUT),
        processing_class=tokenizer(),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def texts(source: toy.Text) -> Dataset:
    return Dataset.from_dict({"text": [toy.window(number) for number in source.windows]})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token an ASCII character."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>"}
    vocabulary = {special.get(code, chr(code)): code for code in range(toy.LETTERS)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    toy.main(train)
