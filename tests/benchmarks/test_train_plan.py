"""Estimates beside measurements: those of ``python -m poetx_compile plan``, of the very model that a case trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import llama
import pytest
import torch
import train_plan
from torch.multiprocessing.reductions import StorageWeakRef
from train_run import Case

from poetx_compile import PoetxConfig, PoetxError, forecast
from poetx_compile.registry import factors

TINY = llama.SIZES["tiny"]
MODEL = f"llama:hidden={TINY.hidden},intermediate={TINY.ffn},layers=1,heads={TINY.heads},vocab={TINY.vocabulary}"
CHECKPOINTED = "checkpointing=True"


def case(method: str, **changes: Any) -> Case:
    """Long enough for activations to make the peak."""
    return replace(Case("tiny", method, seq=1024, batch=4, micro=1, layers=1, device="cuda"), **changes)


@pytest.mark.parametrize(
    ("method", "settings", "place"),
    [
        ("poetx:block_size=128:residual_bits=4", {"block_size": 128}, 1),
        ("poetx:storage=int8:skew_dtype=bfloat16", {"storage": "int8", "skew_dtype": "bfloat16"}, 0),
        ("adamw", {}, -1),
    ],
)
def test_a_case_is_planned_as_by_the_command(method: str, settings: dict[str, Any], place: int) -> None:
    config = forecast.read_config(MODEL)
    config.use_cache = False
    found = forecast.plan(config, 1024, 4, torch.bfloat16, PoetxConfig(**settings), ordinary=True, fused=True)
    assert train_plan.planned_bytes(case(method)) == found.choices[place].estimate.total


@pytest.mark.parametrize("method", ["poetx:storage=int8", "adamw"])
def test_checkpointing_is_planned(method: str) -> None:
    without, under = (train_plan.planned_bytes(case(text, layers=4)) for text in (method, f"{method}:{CHECKPOINTED}"))
    assert under < 0.7 * without


@pytest.mark.parametrize("method", ["poetx:storage=int8", "adamw"])
def test_a_checkpointed_model_saves_less(method: str) -> None:
    small = {"layers": 2, "seq": 128, "batch": 1, "device": "cpu", "compiler": "aot_eager"}
    without, under = (saved_bytes(case(text, **small)) for text in (method, f"{method}:{CHECKPOINTED}"))
    assert under < 0.5 * without


def saved_bytes(chosen: Case) -> int:
    """What autograd keeps between the forward and the backward pass of the second step, beside what lasts."""
    torch._dynamo.reset()
    model = llama.build(chosen.shape, chosen.seq, torch.device("cpu"))
    trainer = chosen.spec.trainer(model, chosen.shape)
    ids = torch.randint(chosen.shape.vocabulary, (chosen.batch, chosen.seq))
    trainer.loss(ids).backward()
    trainer.update()
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.loss(ids)
    loss.backward()
    lasting = [*model.parameters(), *(tensor for factor in factors.of_module(model) for tensor in factor.inputs.values())]
    outside = {StorageWeakRef(tensor.untyped_storage()) for tensor in lasting}
    return sum(size for storage, size in kept.items() if storage not in outside)


@pytest.mark.parametrize(
    "unknown",
    [
        case("lora"),
        case("adafactor"),
        case("adamw", micro=2),
        case("adamw:mode=reduce-overhead"),
        case("poetx:max_autotune=True"),
    ],
    ids=lambda unknown: f"{unknown.method}, micro={unknown.micro}",
)
def test_what_the_estimator_does_not_know_is_not_planned(unknown: Case) -> None:
    assert train_plan.planned_bytes(unknown) is None


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(PoetxError, match="did you mean 'storage'"):
        train_plan.planned_bytes(case("poetx:storge=int8"))
