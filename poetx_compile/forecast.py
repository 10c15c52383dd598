"""``python -m poetx_compile plan``: what will training this model take on that GPU? Nothing is allocated, no GPU is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .config import RESIDUAL_BITS, PoetxConfig
from .errors import PoetxError
from .estimate import Estimate, Traced, estimate, trace
from .ladder import CATEGORIES, choose
from .stepper import Stepper

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FIELDS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")
"""What configurations have whose positions are rotations, of any length."""
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_HALF_ONLY = {"storage": "folded", "skew_dtype": "float32"}
"""Settings that say nothing of float32 weights unless they are these."""


@dataclass(frozen=True)
class Choice:
    """A way to train, and its estimate."""

    name: str
    estimate: Estimate


@dataclass(frozen=True)
class Plan:
    """Ways to train, and in words what ``memory`` would do on the card, where that was asked."""

    choices: list[Choice]
    memory: str = ""


def run(
    model: str,
    gpu: str | None,
    seq: int,
    batch: int,
    dtype: str = "bfloat16",
    block_size: int = PoetxConfig.block_size,
    storage: str = "auto",
    skew_dtype: str | None = None,
    activation_memory_budget: float | None = None,
    ordinary: bool = False,
    fused: bool = False,
    checkpointing: bool = False,
    console: Console | None = None,
) -> bool:
    """Print an estimate for each number of residual bits, or for a lean storage, and tell whether any fits.

    Args:
        model: a transformers ``config.json``, its folder, or ``llama:hidden=4096,layers=32,...``.
        gpu: memory of the card, ``24GB``; None to print sizes only.
        storage: ``auto`` for folded weights, and for what the option ``memory`` would take on the card.
        skew_dtype, activation_memory_budget: None for the default, which ``memory`` may change.
        seq, batch: tokens of a sequence, and sequences of a micro-batch.
        ordinary: estimate ``torch.compile`` with AdamW too, for comparison.
        fused: whether AdamW is the fused one.
        checkpointing: whether the model checkpoints activations by its own ``gradient_checkpointing_enable()``.

    Raises:
        PoetxError: a configuration, a size or a number that cannot be read.
    """
    if min(seq, batch) < 1:
        raise PoetxError(f"poetx: --seq and --batch must be 1 or more, not {seq} and {batch}")
    card = None if gpu is None else parse_size(gpu)
    options = {"storage": storage, "skew_dtype": skew_dtype, "activation_memory_budget": activation_memory_budget}
    given = {name: value for name, value in options.items() if value not in (None, "auto")}
    for name, only in _HALF_ONLY.items():
        if dtype == "float32" and given.get(name, only) != only:
            raise PoetxError(
                f"poetx: {name}={given[name]} is for half-precision weights, and --dtype float32 has none; leave one of them out"
            )
    settings = PoetxConfig.of_options({"block_size": block_size} | given)
    limit = card if storage == "auto" else None
    found = plan(read_config(model), seq, batch, DTYPES[dtype], settings, ordinary, fused, limit, checkpointing)
    console = console or Console()
    title = f"{model}, {batch} × {seq} tokens, {dtype}, {'fused ' * fused}AdamW{', checkpointing' * checkpointing}"
    console.print(_table(found.choices, card, title))
    if found.memory:
        console.print(found.memory, highlight=False)
    fits = card is None or any(choice.estimate.total <= card for choice in found.choices)
    if not fits and not checkpointing:
        console.print("Nothing fits; --checkpointing estimates it with the model's own activation checkpointing")
    return fits


def plan(
    config: Any,
    seq: int,
    batch: int,
    dtype: torch.dtype,
    settings: PoetxConfig,
    ordinary: bool = False,
    fused: bool = False,
    limit: float | None = None,
    checkpointing: bool = False,
) -> Plan:
    """Estimates for a causal language model: with every number of residual bits where its weights are folded, 8 first.

    Args:
        config: of transformers.
        limit: bytes, for what ``memory`` would choose.
        checkpointing: whether the model checkpoints its activations.
    """
    from transformers import AutoModelForCausalLM

    def build() -> nn.Module:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise PoetxError(f"poetx: plan knows causal language models only: {error}") from error
        return _checkpointed(model) if checkpointing else model

    def loss(model: Callable[..., Any]) -> Tensor:
        ids = torch.zeros(batch, seq, dtype=torch.int64)
        return model(input_ids=ids, labels=ids).loss

    text = config.get_text_config()
    vocabulary, positions = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if vocabulary is None:
        raise PoetxError(f"poetx: plan knows causal language models only, and {config.model_type} has no vocabulary")
    if positions is not None and seq > positions and not any(hasattr(text, name) for name in _ROTARY):
        raise PoetxError(f"poetx: {config.model_type} has {positions} positions here, fewer than a sequence of {seq} needs")
    stepper = Stepper(is_fused=fused)
    try:
        traced = trace(build, loss, settings, vocabulary)
    except PoetxError:
        raise
    except (RuntimeError, ValueError) as error:
        raise PoetxError(f"poetx: a model of this configuration does not run: {_in_a_line(error)}") from error
    if dtype == torch.float32:
        choices = [Choice("poetx", estimate(traced, stepper=stepper))]
    elif settings.storage == "folded":
        choices = [Choice(f"residual_bits={number}", estimate(traced, number, stepper)) for number in RESIDUAL_BITS]
    else:
        choices = [Choice(f"storage={settings.storage}", estimate(traced, stepper=stepper))]
    if ordinary:
        choices.append(Choice("ordinary", estimate(trace(build, loss, None, vocabulary), stepper=stepper)))
    if limit is None:
        return Plan(choices)

    def again(rung: PoetxConfig) -> Traced:
        is_same = rung.activation_memory_budget == settings.activation_memory_budget
        return traced if is_same else trace(build, loss, rung, vocabulary)

    try:
        chosen = choose(replace(settings, memory=limit / 1e9), limit, again, stepper, settings.movable)
    except PoetxError as error:
        return Plan(choices, str(error))
    assert chosen.estimate is not None
    return Plan([*choices, Choice("auto", chosen.estimate)], str(chosen))


def _checkpointed(model: Any) -> Any:
    if not model.supports_gradient_checkpointing:
        raise PoetxError(
            f"poetx: {type(model).__name__} does not support activation checkpointing; leave --checkpointing out"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # as transformers does then, with a warning
    return model


def read_config(text: str) -> Any:
    """A transformers configuration from a file, a folder or a shorthand.

    Raises:
        PoetxError: there is no such file, or a field that a shorthand does not know.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise PoetxError("poetx: plan builds models of transformers; install it first") from error
    kind, _, fields = text.partition(":")
    if kind == "llama" and fields:
        return _configured(text, {"model_type": "llama"} | _shorthand(fields))
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise PoetxError(
            f"poetx: there is no configuration at {text}; give a config.json, the folder of one, or "
            "llama:hidden=4096,intermediate=14336,layers=32,heads=32,vocab=32000"
        )
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise PoetxError(f"poetx: {path} is not a configuration of transformers: {error!r}") from error
    return _configured(str(path), settings)


def _configured(source: str, settings: Any) -> Any:
    from transformers import AutoConfig

    try:
        settings = dict(settings)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # each configuration class checks in its own way
        raise PoetxError(f"poetx: {source} is not a configuration of transformers: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _shorthand(fields: str) -> dict[str, int]:
    settings = {}
    for part in fields.split(","):
        name, _, number = part.partition("=")
        if name not in _FIELDS or not number.isdecimal() or not int(number):
            raise PoetxError(f"poetx: {part!r} is not one of {', '.join(f'{known}=N' for known in _FIELDS)}")
        settings[_FIELDS[name]] = int(number)
    settings.setdefault("num_key_value_heads", settings.get("num_attention_heads", 32))
    return settings


def parse_size(text: str) -> float:
    """Bytes of ``24GB`` (10⁹ each), ``24GiB`` (2³⁰ each), or a bare number of GB, as the option ``memory`` takes.

    Raises:
        PoetxError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text if text[-1:].isalpha() else f"{text}GB", re.IGNORECASE)
    if found is None:
        raise PoetxError(f"poetx: --gpu takes a size such as 24GB or 80GiB, not {text!r}")
    number, unit, binary = found.groups()
    return float(number) * (1024 ** list(_UNITS).index(unit.upper()) if binary else _UNITS[unit.upper()])


def _table(choices: Sequence[Choice], card: float | None, title: str) -> Table:
    table = Table(title=f"{title}: GB at the peak of a step", title_justify="left")
    table.add_column("")
    for choice in choices:
        table.add_column(choice.name, justify="right")
    for category in CATEGORIES:
        sizes = (_gigabytes(getattr(choice.estimate, category)) for choice in choices)
        table.add_row(category, *sizes, end_section=category == CATEGORIES[-1])
    table.add_row("total", *(_gigabytes(choice.estimate.total) for choice in choices))
    table.add_row("peak in", *(choice.estimate.at for choice in choices))
    if card is not None:
        fits = ("[green]yes[/]" if choice.estimate.total <= card else "[red]no[/]" for choice in choices)
        table.add_row(f"fits {card / 1e9:.3g} GB", *fits)
    return table


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"
