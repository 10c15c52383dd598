"""Models as they are found in the wild, from their own configs at toy size: what must train as rotations, unmodified."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NanoGPT, Translator
from torch import Tensor, nn

VOCABULARY, CLASSES, TOKENS, BATCH = 96, 10, 12, 4


@dataclass(frozen=True)
class Toy:
    """A model, a fixed batch for it, and what is expected of its conversion.

    Attributes:
        make: the model, from ``library``'s module if one is needed.
        inputs: the keyword arguments of one batch.
        coverage: per cent of all numbers that are rotated, as the report says.
        options: of the backend, beside those of all toys.
        outputs: the tensor to compare, of what the model returns.
        loss: of what the model returns and the batch's inputs.
    """

    name: str
    make: Callable[[Any], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    coverage: float
    library: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    outputs: Callable[[Any], Tensor] = lambda result: result
    loss: Callable[[Any], Tensor] = lambda result: F.cross_entropy(result.flatten(0, -2), _labels(result))

    def model(self) -> nn.Module:
        """A fresh model in training mode, always the same; skips the test if its library is missing."""
        library = _library(self.library) if self.library else None
        torch.manual_seed(0)
        return self.make(library).train()

    def __str__(self) -> str:
        return self.name


def _library(name: str) -> Any:
    """A module; skips the test if it is not installed."""
    try:
        return pytest.importorskip(name)
    except RuntimeError as error:  # PyPI's torchvision is built for CUDA: beside a CPU torch it does not load its operators
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for missing in ("nms", "qnms"):  # no model of ours calls them
        _OPERATORS.define(f"{missing}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def _labels(result: Tensor) -> Tensor:
    """One class for each row of outputs, the same for every call."""
    return torch.arange(result.flatten(0, -2).shape[0]) * 7 % result.shape[-1]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(2, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


# --- 🤗 transformers -------------------------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _causal() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": _tokens(), "use_cache": False}


def _masked() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": _tokens()}


def _translation() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": _tokens(8), "use_cache": False}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _numbers(BATCH, 3, 16, 16), "labels": torch.arange(BATCH)}


def _speech() -> dict[str, Any]:
    return {"input_features": _numbers(BATCH, 16, 2 * TOKENS), "labels": _tokens(8), "use_cache": False}


def _transformer(
    name: str,
    coverage: float,
    architecture: str,
    config: str,
    inputs: Callable[[], dict[str, Any]] = _causal,
    **settings: Any,
) -> Toy:
    def make(transformers: Any) -> nn.Module:
        return getattr(transformers, architecture)(getattr(transformers, config)(**settings))

    outputs = {"outputs": lambda result: result.logits, "loss": lambda result: result.loss}
    return Toy(name, make, inputs, coverage, "transformers", **outputs)


TRANSFORMERS = [
    _transformer("Llama", 79.6, "LlamaForCausalLM", "LlamaConfig", **_SIZES, **_GROUPED),
    _transformer("Qwen3", 79.5, "Qwen3ForCausalLM", "Qwen3Config", **_SIZES, **_GROUPED),
    _transformer(
        "Gemma 3",
        87.9,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **_SIZES,
        **_GROUPED,
        query_pre_attn_scalar=12,
        sliding_window=8,
        pad_token_id=0,
    ),
    _transformer(
        "GPT-2",
        88.1,
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    ),
    _transformer("BERT", 82.6, "BertForMaskedLM", "BertConfig", _masked, **_SIZES, **_NO_DROPOUT),
    _transformer(
        "T5",
        94.1,
        "T5ForConditionalGeneration",
        "T5Config",
        _translation,
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    _transformer(
        "ViT",
        87.5,
        "ViTForImageClassification",
        "ViTConfig",
        _pixels,
        **{name: size for name, size in _SIZES.items() if name not in ("vocab_size", "max_position_embeddings")},
        **_NO_DROPOUT,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    ),
    _transformer(
        "Whisper",
        82.3,
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _speech,
        vocab_size=VOCABULARY,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        num_mel_bins=16,
        max_source_positions=TOKENS,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    ),
    _transformer(
        "Mixtral",
        91.8,
        "MixtralForCausalLM",
        "MixtralConfig",
        **_SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _transformer(
        "Qwen3-MoE",
        84.3,
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **_SIZES,
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    _transformer(
        "Mamba-2",
        74.3,
        "Mamba2ForCausalLM",
        "Mamba2Config",
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=12,
        state_size=16,
        n_groups=1,
        chunk_size=8,
    ),
]

# --- Vision ----------------------------------------------------------------------------------------------------------


def _images(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": _numbers(BATCH, 3, size, size)}


def _timm(name: str, architecture: str, size: int, coverage: float, **settings: Any) -> Toy:
    def make(timm: Any) -> nn.Module:
        return timm.create_model(architecture, num_classes=CLASSES, **settings)

    return Toy(name, make, _images(size), coverage, "timm", {"include_conv": True})


def _resnet(torchvision: Any) -> nn.Module:
    models = importlib.import_module("torchvision.models.resnet")
    return models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


VISION = [
    _timm("timm ViT", "vit_tiny_patch16_224", 32, 95.9, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4),
    _timm("timm ConvNeXt", "convnext_atto", 64, 88.4, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    Toy("torchvision ResNet", _resnet, _images(32), 99.8, "torchvision", {"include_conv": True, "heads": ["fc"]}),
]

# --- PyTorch ---------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """``nn.TransformerEncoder``, which has a fast path of its own in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 80, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` over a memory of another width: separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 4, kdim=32, vdim=40, batch_first=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.attention(x, keys, values)[0])


PYTORCH = [
    Toy(
        "nn.Transformer",
        lambda _: Translator(VOCABULARY, 48, 4, 2, 80),
        lambda: {"source": _tokens(), "target": _tokens(8)},
        87.6,
    ),
    Toy("nn.TransformerEncoder", lambda _: Tagger(), lambda: {"tokens": _tokens()}, 76.6),
    Toy(
        "nn.MultiheadAttention",
        lambda _: CrossAttention(),
        lambda: {"x": _numbers(BATCH, 6, 48), "keys": _numbers(BATCH, 7, 32), "values": _numbers(BATCH, 7, 40)},
        92.2,
    ),
    Toy(
        "nanoGPT",
        lambda _: NanoGPT(VOCABULARY, 48, 4, 2, 32),
        lambda: {"tokens": _tokens(), "targets": _tokens()},
        88.6,
        outputs=lambda result: result[0],
        loss=lambda result: result[1],
    ),
]

ZOO = TRANSFORMERS + VISION + PYTORCH
