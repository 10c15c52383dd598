"""The models of the whole-model benchmark: unmodified Llamas of ``transformers``, from a configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """Dimensions of a Llama whose query, key and value heads are as many (no grouped queries)."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int = 32000

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the linear layers of one decoder layer."""
        h, f = self.hidden, self.ffn
        return [*4 * [(h, h)], (f, h), (f, h), (h, f)]

    @property
    def outside(self) -> int:
        """Parameters that are not in linear layers of decoder layers: embedding, head and norms."""
        return (2 * self.vocabulary + 2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.outside + self.layers * sum(m * n for m, n in self.linears)


SIZES = {
    "tiny": Size(256, 512, 2, 2, 512),
    "1b": Size(2048, 5632, 24, 16),
    "3b": Size(2560, 7168, 32, 20),
    "8b": Size(4096, 14336, 32, 32),
    "13b": Size(5120, 13824, 40, 40),
    "30b": Size(6656, 17920, 60, 52),
}
"""``tiny`` is for tests; the others have heads of 128 channels."""


def build(
    size: Size, length: int, device: torch.device, dtype: torch.dtype = DTYPE, seed: int = 0, std: float | None = None
) -> nn.Module:
    """A Llama, made on its device. Its weights keep the size of what passes through them, unless ``std`` sets another."""
    from transformers import AutoModelForCausalLM, LlamaConfig  # takes seconds, which whoever needs sizes only can spare

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(length, 2048),
        initializer_range=std or size.hidden**-0.5,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def hidden_and_other(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the decoder layers, and all other parameters."""
    inside: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inside if ".layers." in name and parameter.ndim == 2 else outside).append(parameter)
    return inside, outside
