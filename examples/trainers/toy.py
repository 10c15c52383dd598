"""What the recipes beside this file share: a Llama of a few thousand parameters, and a text to learn, both made here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

SENTENCE = "She sells sea shells by the sea shore, and the shells that she sells are sea shells, for sure. "
LENGTH = 32
LETTERS = 128
OPTIONS: dict[str, Any] = {"block_size": 16}
"""Of poetx. Real models keep the default blocks: 256 channels."""

STEPS = 12
SAVE_EVERY = 4
EVALUATE_EVERY = 3
BATCH = 4
ACCUMULATE = 2
RATE = 1e-2


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=32**-0.5,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


class Text(Dataset[dict[str, Tensor]]):
    """Windows of the sentence, one token an ASCII character."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.tensor(list(window(self.windows[index]).encode()))
        return {"input_ids": tokens, "labels": tokens}


def window(number: int) -> str:
    start = 7 * number % len(SENTENCE)
    return (2 * SENTENCE)[start : start + LENGTH]


def loader(data: Text, *, shuffle: bool = False, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    """Batches by random numbers of their own: a loader without a generator takes one of torch's whenever it starts."""
    return DataLoader(data, BATCH, shuffle=shuffle, generator=torch.Generator().manual_seed(seed))


TRAINING, HELD_OUT = Text(range(40)), Text(range(40, 48))


def main(train: Callable[[Path, Path | None], torch.nn.Module]) -> None:
    """``python RECIPE.py`` trains in ``runs/RECIPE``; ``python RECIPE.py runs/RECIPE/checkpoint-8`` goes on from there."""
    resume = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    train(Path("runs", Path(sys.argv[0]).stem), resume)
