"""Unmodified models of 🤗 transformers, at toy size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from poetx_compile.base import BASES
from poetx_compile.conversion import skip_reason
from poetx_compile.passes import SkipReason
from poetx_compile.registry import factors
from poetx_compile.stand_in import StandIn

VOCABULARY = 96
DEBUG: dict[str, Any] = {"inner": "aot_eager", "block_size": 32}


def llama(layers: int = 2, **settings: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes, **settings))


def gpt2() -> PreTrainedModel:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=32, **dropouts))


def loss_of(call: Callable[..., Any]) -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    loss: Tensor = call(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def train(compiled: Callable[..., Any], model: nn.Module, steps: int = 12) -> None:
    """Fit one batch, and see that it is learnt."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(compiled)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def check_rotated(model: nn.Module, start: nn.Module, ordinary: dict[str, SkipReason]) -> None:
    """Every matrix has moved; it keeps its singular values, unless it is one of those that stay ordinary."""
    for (name, weight), old in zip(matrices(model).items(), matrices(start).values(), strict=True):
        assert not torch.equal(weight, old), name
        now, before = (torch.linalg.svdvals(matrix.detach().double()) for matrix in (weight, old))
        assert torch.allclose(now, before, rtol=1e-5, atol=0) is (name not in ordinary), name
        assert (factors.of_weight(weight) is None) is (name in ordinary), name
        assert skip_reason(weight) is ordinary.get(name), name


def check_agreement(model: PreTrainedModel, compiled: Any) -> None:
    """Raw, compiled and freshly loaded, the model is one."""
    tokens = torch.arange(10)[None]
    model.eval()
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        raw = model(tokens).logits
        torch.testing.assert_close(compiled(tokens).logits, raw)
        assert torch.equal(fresh(tokens).logits, raw)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **settings), fresh.generate(tokens, **settings))
    assert torch.equal(compiled.generate(tokens, **settings), fresh.generate(tokens, **settings))


def check_training(model: PreTrainedModel, ordinary: dict[str, SkipReason]) -> None:
    start = copy.deepcopy(model)
    compiled = torch.compile(model, backend="poetx", options=DEBUG)
    train(compiled, model)
    check_rotated(model, start, ordinary)
    check_agreement(model, compiled)


UNTIED = {"model.embed_tokens.weight": SkipReason.EMBEDDING, "lm_head.weight": SkipReason.HEAD}


def test_llama() -> None:
    check_training(llama(), UNTIED)


def test_llama_through_inductor() -> None:
    model = llama(layers=1)
    start = copy.deepcopy(model)
    compiled = torch.compile(model, backend="poetx", options={"block_size": 32})
    train(compiled, model)
    check_rotated(model, start, UNTIED)
    torch.testing.assert_close(loss_of(compiled), loss_of(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("storage", BASES)
def test_llama_stored_lean(storage: str, checkpointing: bool, tmp_path: Path) -> None:
    model = llama().bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="poetx", options=DEBUG | {"storage": storage})
    train(compiled, model)
    lean = {name for name, weight in matrices(model).items() if type(weight) is StandIn}
    assert lean == set(matrices(model)) - set(UNTIED)
    tokens = torch.arange(10)[None]
    model.eval().save_pretrained(tmp_path)
    fresh = copy.deepcopy(model)
    assert not any(type(weight) is StandIn for weight in fresh.parameters())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, fresh(tokens).logits)
        assert torch.equal(compiled(tokens).logits, fresh(tokens).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **settings), fresh.generate(tokens, **settings))


def test_llama_with_tied_embeddings() -> None:
    check_training(llama(tie_word_embeddings=True), {"model.embed_tokens.weight": SkipReason.TIED})


def test_llama_with_checkpointed_blocks() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    start = copy.deepcopy(model)
    train(torch.compile(model, backend="poetx", options=DEBUG), model)
    check_rotated(model, start, UNTIED)


def test_gpt2() -> None:
    """Weights stored inputs × outputs, and an embedding tied to the head."""
    check_training(gpt2(), {"transformer.wte.weight": SkipReason.TIED, "transformer.wpe.weight": SkipReason.EMBEDDING})


@pytest.mark.parametrize("make", [llama, gpt2])
def test_all_linear_layers_take_the_gram_route(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    loss_of(torch.compile(model, backend="poetx", options=DEBUG))
    routes = {factor.route for weight in model.parameters() if (factor := factors.of_weight(weight)) is not None}
    assert routes == {"gram"}


def test_layers_compiled_one_by_one() -> None:
    """Regional compilation: the head stays outside, so nothing but the layers is converted."""
    model = llama()
    for layer in model.model.layers:
        layer.compile(backend="poetx", options=DEBUG)
    train(model, model)
    converted = {name for name, weight in matrices(model).items() if factors.of_weight(weight)}
    assert converted == {name for name in matrices(model) if ".layers." in name}
