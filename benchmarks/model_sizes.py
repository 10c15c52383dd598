"""Models with the dimensions that their authors published, and the same at toy size; random weights, nothing to download.

``real`` and ``tiny`` in the tables below are arguments of the model's config: dropout is off, so that two passes agree.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from networks import NanoGPT, Translator
from torch import Tensor, nn

Settings = dict[str, Any]
Batch = dict[str, Tensor]

TINY_OPTIONS = {"inner": "aot_eager", "block_size": 16, "chunk": 8}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model in two sizes, and a fixed batch for each.

    Attributes:
        note: what differs from the published model in size, or from how the others are compiled.
        library: the module that ``make`` takes first; None for torch alone.
        make: the model, in a dtype, of its settings.
        batch: keyword arguments for one forward, of the settings, the number of samples and their length.
        sizes: ``real`` and ``tiny``, each with samples and length.
        options: of the backend.
        loss: of what the model returns and the batch.
    """

    name: str
    note: str = ""
    library: str | None
    make: Callable[[Any, torch.dtype, Settings], nn.Module]
    batch: Callable[[Settings, int, int], Batch]
    sizes: dict[str, tuple[Settings, int, int]]
    options: Settings = field(default_factory=dict)
    loss: Callable[[Any, Batch], Tensor]

    def build(self, size: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Batch]:
        """The model in training mode, with the batch on its device and in its dtype; always the same.

        Raises:
            ModuleNotFoundError: its library is not installed.
        """
        library = importlib.import_module(self.library) if self.library else None
        settings, samples, length = self.sizes[size]
        torch.manual_seed(0)
        with device:
            model = self.make(library, dtype, settings)
            batch = self.batch(settings, samples, length)
        moved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        return model.to(device).train(), moved


# --- 🤗 transformers -------------------------------------------------------------------------------------------------


def _tokens(vocabulary: int, samples: int, length: int) -> Tensor:
    return torch.randint(2, vocabulary, (samples, length))


def _text(settings: Settings, samples: int, length: int) -> Batch:
    return {name: _tokens(settings["vocab_size"], samples, length) for name in ("input_ids", "labels")}


def _pixels(settings: Settings, samples: int, _: int) -> Batch:
    side = settings["image_size"]
    return {"pixel_values": torch.randn(samples, 3, side, side), "labels": torch.arange(samples) % settings["num_labels"]}


def _speech(settings: Settings, samples: int, length: int) -> Batch:
    features = torch.randn(samples, settings["num_mel_bins"], 2 * settings["max_source_positions"])
    return {"input_features": features, "labels": _tokens(settings["vocab_size"], samples, length)}


def _transformer(
    name: str,
    config: str,
    real: Settings,
    tiny: Settings,
    *,
    task: str = "CausalLM",
    batch: Callable[[Settings, int, int], Batch] = _text,
    shape: tuple[int, int] = (4, 256),
    both: Settings | None = None,
    options: Settings | None = None,
    note: str = "",
) -> Model:
    def make(transformers: Any, dtype: torch.dtype, settings: Settings) -> nn.Module:
        auto = getattr(transformers, f"AutoModelFor{task}")
        return auto.from_config(getattr(transformers, config)(**settings), dtype=dtype)

    both = both or {}
    return Model(
        name=name,
        note=note,
        library="transformers",
        make=make,
        batch=batch,
        sizes={"real": (real | both, *shape), "tiny": (real | tiny | both, 4, 12)},
        options=options or {},
        loss=lambda result, _: result.loss,
    )


_TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_TINY_GROUPED = _TINY | {"num_key_value_heads": 2, "head_dim": 12}
_DECODER: Settings = {"use_cache": False}
_NO_DROPOUT: Settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENDS: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def _dimensions(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, **others: Any) -> Settings:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


TRANSFORMERS = [
    _transformer(
        "T5 large",
        "T5Config",
        {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
        {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        task="Seq2SeqLM",
        both={"dropout_rate": 0.0, "decoder_start_token_id": 0, **_DECODER},
    ),
    _transformer(
        "Whisper medium",
        "WhisperConfig",
        {
            "vocab_size": 51865,
            "d_model": 1024,
            "encoder_layers": 24,
            "decoder_layers": 24,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "max_target_positions": 448,
        },
        {
            "vocab_size": 96,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
            "num_mel_bins": 16,
            "max_source_positions": 12,
            "max_target_positions": 32,
        },
        task="SpeechSeq2Seq",
        batch=_speech,
        shape=(2, 128),
        both={"dropout": 0.0, "decoder_start_token_id": 1, **_ENDS, **_DECODER},
    ),
    _transformer(
        "Mamba-2 1.3B",
        "Mamba2Config",
        {"vocab_size": 50288, "hidden_size": 2048, "num_hidden_layers": 12, "num_heads": 64, "head_dim": 64}
        | {"state_size": 128, "n_groups": 1, "chunk_size": 256},
        {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 12}
        | {"state_size": 16, "chunk_size": 8},
        both=_DECODER,
        shape=(2, 256),
        options={"inner": "aot_eager"},
        note="12 of 48 layers, by aot_eager, since Inductor of torch 2.11 fails on it, with poetx or without",
    ),
    _transformer(
        "GPT-2 large",
        "GPT2Config",
        {"vocab_size": 50257, "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024},
        {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32},
        both={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_ENDS, **_DECODER},
    ),
    _transformer(
        "Gemma 3 1B",
        "Gemma3TextConfig",
        _dimensions(262144, 1152, 6912, 26, 4, num_key_value_heads=1, head_dim=256)
        | {"query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768},
        _TINY_GROUPED | {"query_pre_attn_scalar": 12, "sliding_window": 8},
        both=_DECODER,
    ),
    _transformer(
        "Qwen3 0.6B",
        "Qwen3Config",
        _dimensions(151936, 1024, 3072, 28, 16, num_key_value_heads=8, head_dim=128)
        | {"tie_word_embeddings": True, "max_position_embeddings": 40960},
        _TINY_GROUPED,
        both=_DECODER,
    ),
    _transformer(
        "BERT large",
        "BertConfig",
        _dimensions(30522, 1024, 4096, 24, 16, max_position_embeddings=512),
        _TINY,
        task="MaskedLM",
        both=_NO_DROPOUT,
    ),
    _transformer(
        "ViT large",
        "ViTConfig",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 16, "num_labels": 1000},
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 16, "patch_size": 4, "num_labels": 10},
        task="ImageClassification",
        batch=_pixels,
        shape=(8, 0),
        both=_NO_DROPOUT,
    ),
    _transformer(
        "Llama 3.2 1B",
        "LlamaConfig",
        _dimensions(128256, 2048, 8192, 16, 32, num_key_value_heads=8, head_dim=64)
        | {"tie_word_embeddings": True, "max_position_embeddings": 131072},
        _TINY_GROUPED,
        both=_DECODER,
    ),
    _transformer(
        "Mixtral 8x7B",
        "MixtralConfig",
        _dimensions(32000, 4096, 14336, 1, 32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2),
        _TINY | {"num_key_value_heads": 2, "num_local_experts": 4},
        both=_DECODER,
        note="1 of 32 layers",
    ),
    _transformer(
        "Qwen3 30B-A3B",
        "Qwen3MoeConfig",
        _dimensions(151936, 2048, 6144, 2, 32, num_key_value_heads=4, head_dim=128)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        _TINY_GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        both=_DECODER,
        note="2 of 48 layers",
    ),
]

# --- Vision, and PyTorch alone ---------------------------------------------------------------------------------------


def _images(settings: Settings, samples: int, side: int) -> Batch:
    return {"x": torch.randn(samples, 3, side, side)}


def _classified(result: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(result.float(), torch.arange(len(result), device=result.device) % result.shape[-1])


def _timm(name: str, architecture: str, tiny: Settings, side: int) -> Model:
    def make(timm: Any, dtype: torch.dtype, settings: Settings) -> nn.Module:
        return timm.create_model(architecture, **settings).to(dtype)

    return Model(
        name=name,
        library="timm",
        make=make,
        batch=_images,
        sizes={"real": ({}, 8, 224), "tiny": (tiny | {"num_classes": 10}, 4, side)},
        options={"include_conv": True},
        loss=_classified,
    )


def _resnet(torchvision: Any, dtype: torch.dtype, settings: Settings) -> nn.Module:
    module = importlib.import_module("torchvision.models.resnet")
    return module.ResNet(getattr(module, settings["block"]), settings["layers"], settings["classes"]).to(dtype)


def _nano(_: Any, dtype: torch.dtype, settings: Settings) -> nn.Module:
    return NanoGPT(**settings).to(dtype)


def _translator(_: Any, dtype: torch.dtype, settings: Settings) -> nn.Module:
    return Translator(**settings).to(dtype)


def _pair(*names: str) -> Callable[[Settings, int, int], Batch]:
    return lambda settings, samples, length: {name: _tokens(settings["vocabulary"], samples, length) for name in names}


OTHERS = [
    _timm("timm ViT large", "vit_large_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}, 32),
    _timm("timm ConvNeXt large", "convnext_large", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}, 64),
    Model(
        name="torchvision ResNet-152",
        library="torchvision",
        make=_resnet,
        batch=_images,
        sizes={
            "real": ({"block": "Bottleneck", "layers": [3, 8, 36, 3], "classes": 1000}, 16, 224),
            "tiny": ({"block": "BasicBlock", "layers": [1, 1, 1, 1], "classes": 10}, 4, 32),
        },
        options={"include_conv": True, "heads": ["fc"]},
        loss=_classified,
    ),
    Model(
        name="nn.Transformer big",
        library=None,
        make=_translator,
        batch=_pair("source", "target"),
        sizes={
            "real": ({"vocabulary": 37000, "width": 1024, "heads": 16, "layers": 6, "ffn": 4096}, 4, 256),
            "tiny": ({"vocabulary": 96, "width": 48, "heads": 4, "layers": 2, "ffn": 80}, 4, 12),
        },
        loss=lambda result, batch: F.cross_entropy(result.flatten(0, 1).float(), batch["target"].flatten()),
    ),
    Model(
        name="nanoGPT gpt2-medium",
        library=None,
        make=_nano,
        batch=_pair("tokens", "targets"),
        sizes={
            "real": ({"vocabulary": 50304, "width": 1024, "heads": 16, "layers": 24, "positions": 1024}, 4, 256),
            "tiny": ({"vocabulary": 96, "width": 48, "heads": 4, "layers": 2, "positions": 32}, 4, 12),
        },
        loss=lambda result, _: result[1],
    ),
]

MODELS = {model.name: model for model in TRANSFORMERS + OTHERS}
"""By name, those that compile longest first."""
