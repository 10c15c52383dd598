"""Whether a loss holds logits in float32: docs/memory.md says when, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.autograd.graph import saved_tensors_hooks

TOKENS, VOCABULARY = 64, 4096
IDS = torch.arange(TOKENS)[None] * 37 % VOCABULARY


@pytest.fixture
def model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def train(model: Callable[..., nn.Module]) -> None:
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def saved(model: nn.Module) -> set[torch.dtype]:
    """The dtypes of what autograd keeps of the size of the logits."""
    found = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.numel() >= (TOKENS - 1) * VOCABULARY:
            found.add(tensor.dtype)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        train(model)
    return found


def test_code_for_a_model_with_its_loss_has_no_float32_logits(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="poetx", dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters())
    _, codes = run_and_get_code(train, compiled)
    buffers = re.findall(rf"empty_strided\w*\(\(([\d, ]*), {VOCABULARY}\).*?(torch\.\w+)\)", "\n".join(codes))
    assert {dtype for _, dtype in buffers} == {"torch.bfloat16"}
    optimizer.zero_grad()


def test_layers_compiled_one_by_one_leave_the_loss_as_it_is_written(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.compile(backend="poetx", dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert torch.float32 in saved(model)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)
    assert saved(model) == {torch.bfloat16}
    optimizer.zero_grad()
