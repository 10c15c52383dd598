"""The command that estimates memory ahead: what it reads, what it prints, and what it says to what it cannot read."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import llama
import pytest
import torch
import train_plan
from rich.console import Console
from train_run import Case
from transformers import BertConfig, CTRLConfig, GPT2Config, LlamaConfig

from poetx_compile import PoetxConfig, PoetxError, forecast

TINY = "llama:hidden=64,intermediate=128,layers=1,heads=2,vocab=256"


def printed(**changes: object) -> tuple[bool, str]:
    text = io.StringIO()
    settings = {"model": TINY, "gpu": "1GB", "seq": 32, "batch": 1, "block_size": 32} | changes
    return forecast.run(**settings, console=Console(width=160, file=text)), text.getvalue()


def test_prints_every_category_for_every_storage() -> None:
    fits, text = printed(ordinary=True)
    assert fits
    for word in ("residual_bits=8", "residual_bits=4", "residual_bits=0", "ordinary", "fits 1 GB"):
        assert word in text
    for category in ("weights", "residuals", "q", "states", "gradients", "activations", "logits", "scratch", "total"):
        assert category in text


def test_half_precision_alone_has_a_choice_of_bits() -> None:
    assert "residual_bits" not in printed(dtype="float32")[1]


@pytest.mark.parametrize("storage", ["int8", "bf16-lean"])
def test_a_lean_storage_is_estimated_alone(storage: str) -> None:
    _, text = printed(storage=storage)
    assert f"storage={storage}" in text
    assert "residual_bits" not in text


def test_what_memory_would_take_on_the_card_is_shown() -> None:
    _, text = printed(gpu="1GB")
    assert "auto" in text
    assert "memory=1.0 takes storage=folded, skew_dtype=float32, activation_memory_budget=1.0: estimated peak" in text
    assert "memory=" not in printed(gpu=None)[1], "no card, no choice"
    assert "memory=" not in printed(storage="int8")[1], "nor where a storage is named"


def test_what_memory_would_take_leaves_named_settings_alone() -> None:
    _, text = printed(gpu="1GB", skew_dtype="bfloat16", activation_memory_budget=0.7)
    assert "memory=1.0 takes storage=folded, skew_dtype=bfloat16, activation_memory_budget=0.7" in text


def test_where_nothing_fits_the_leanest_is_said() -> None:
    fits, text = printed(gpu="100KB")
    assert not fits
    assert "no settings fit memory=0.0001 " in text.replace("\n", " ")


def test_what_does_not_fit_is_said() -> None:
    fits, text = printed(gpu="100KB")
    assert not fits
    assert "no" in text


DEEP = "llama:hidden=64,intermediate=128,layers=8,heads=2,vocab=256"


def test_checkpointing_saves_less() -> None:
    config, settings = forecast.read_config(DEEP), PoetxConfig(block_size=32, storage="int8")
    without, under = (
        forecast.plan(config, 1024, 1, torch.bfloat16, settings, ordinary=True, checkpointing=asked).choices
        for asked in (False, True)
    )
    for ours, theirs in zip(under, without, strict=True):
        assert ours.estimate.saved < 0.3 * theirs.estimate.saved
        assert ours.estimate.total < theirs.estimate.total


@pytest.mark.parametrize(("method", "place"), [("poetx:storage=int8", 0), ("adamw", -1)])
def test_checkpointing_is_planned_as_for_the_benchmark(method: str, place: int) -> None:
    size = llama.SIZES["tiny"]
    model = f"llama:hidden={size.hidden},intermediate={size.ffn},layers=2,heads={size.heads},vocab={size.vocabulary}"
    case = Case("tiny", f"{method}:checkpointing=True", seq=1024, batch=4, micro=1, layers=2, device="cuda")
    settings = PoetxConfig(storage="int8")
    found = forecast.plan(
        forecast.read_config(model), 1024, 4, torch.bfloat16, settings, ordinary=True, fused=True, checkpointing=True
    )
    assert train_plan.planned_bytes(case) == found.choices[place].estimate.total


def test_the_title_says_checkpointing() -> None:
    assert "AdamW, checkpointing: GB" in printed(checkpointing=True)[1]


def test_where_nothing_fits_checkpointing_is_hinted_at() -> None:
    hint = "--checkpointing estimates it with"
    assert hint in printed(gpu="100KB", storage="int8")[1]
    assert hint not in printed(gpu="100KB", storage="int8", checkpointing=True)[1]
    assert hint not in printed(gpu="1GB")[1]
    assert hint not in printed(gpu=None)[1]


def test_a_model_that_cannot_checkpoint_is_refused(tmp_path: Path) -> None:
    CTRLConfig(vocab_size=64, n_positions=32, n_embd=32, dff=64, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(
        PoetxError, match="CTRLLMHeadModel does not support activation checkpointing; leave --checkpointing out"
    ):
        printed(model=str(tmp_path), checkpointing=True)


@pytest.mark.parametrize("setting", [{"storage": "int8"}, {"storage": "bf16-lean"}, {"skew_dtype": "bfloat16"}])
def test_settings_of_half_precision_are_refused_beside_float32(setting: dict[str, str]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(PoetxError, match=f"{name}={value} is for half-precision weights, and --dtype float32 has none"):
        printed(dtype="float32", **setting)
    printed(dtype="float32", storage="folded", skew_dtype="float32")


def test_the_command_tells_by_its_exit_status() -> None:
    command = [sys.executable, "-m", "poetx_compile", "plan", "--model", TINY, "--seq", "32", "--gpu", "1KB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "fits 1e-06 GB" in done.stdout, done.stderr
    done = subprocess.run([*command[:-1], "1", "--checkpointing", "--fused"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_folder", [False, True])
def test_reads_a_configuration_from_disk(tmp_path: Path, is_folder: bool) -> None:
    LlamaConfig(hidden_size=96, num_hidden_layers=5).save_pretrained(tmp_path)
    config = forecast.read_config(str(tmp_path if is_folder else tmp_path / "config.json"))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 96, 5)


def test_a_shorthand_is_a_configuration() -> None:
    config = forecast.read_config("llama:hidden=4096,intermediate=14336,layers=32,heads=32,kv_heads=8,vocab=128256")
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 14336, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 8, 128256)
    assert forecast.read_config("llama:heads=16").num_key_value_heads == 16


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24 gb", 24e9), ("80GiB", 80 * 2**30), ("1.5T", 1.5e12), ("512MiB", 2**29), ("9B", 9)],
)
def test_sizes(text: str, size: float) -> None:
    assert forecast.parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "1.5"])
def test_a_bare_number_is_gigabytes_as_in_the_option_memory(text: str) -> None:
    assert forecast.parse_size(text) == PoetxConfig(memory=float(text)).memory * 1e9


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-3GB", "24 GB free"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PoetxError, match=r"--gpu takes a size such as 24GB or 80GiB"):
        forecast.parse_size(text)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("llama:hiden=4096", "'hiden=4096' is not one of hidden=N, intermediate=N"),
        ("llama:layers=0", "'layers=0' is not one of"),
        ("llama:layers", "'layers' is not one of"),
        ("nowhere/config.json", "there is no configuration at nowhere/config.json; give a config.json"),
    ],
)
def test_a_wrong_model_is_refused(model: str, sentence: str) -> None:
    with pytest.raises(PoetxError, match=sentence):
        forecast.read_config(model)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model_type": "none such"}'])
def test_a_wrong_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PoetxError, match="is not a configuration of transformers"):
        forecast.read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("llama:hidden=63,heads=4", "is not a configuration of transformers: .* not a multiple"),
        (
            "llama:hidden=64,heads=4,kv_heads=3,intermediate=64,layers=1,vocab=50",
            "a model of this configuration does not run",
        ),
    ],
)
def test_a_model_that_cannot_run_is_refused(model: str, sentence: str) -> None:
    with pytest.raises(PoetxError, match=sentence):
        printed(model=model, seq=16)


def test_a_model_without_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(PoetxError, match="plan knows causal language models only, and vit has no vocabulary"):
        printed(model=str(tmp_path))


@pytest.mark.parametrize(("seq", "batch"), [(0, 1), (32, 0)])
def test_no_tokens_are_refused(seq: int, batch: int) -> None:
    with pytest.raises(PoetxError, match="must be 1 or more"):
        printed(seq=seq, batch=batch)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    class Vision(BertConfig):
        model_type = "vit"

    Vision().save_pretrained(tmp_path)
    with pytest.raises(PoetxError, match="plan knows causal language models only"):
        printed(model=str(tmp_path))


def test_more_tokens_than_positions_are_refused_unless_positions_are_rotations(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=8).save_pretrained(tmp_path / "gpt2")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes, max_position_embeddings=8).save_pretrained(tmp_path / "llama")
    with pytest.raises(PoetxError, match="gpt2 has 8 positions here, fewer than a sequence of 9 needs"):
        printed(model=str(tmp_path / "gpt2"), seq=9)
    for model, seq in (("gpt2", 8), ("llama", 9)):
        fits, _ = printed(model=str(tmp_path / model), seq=seq)
        assert fits
