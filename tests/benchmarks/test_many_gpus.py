"""The formulas of docs/distributed.md against what is counted, and the committed table against the formulas."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import many_gpus

    return many_gpus


def sent(plan: ModuleType, name: str, ranks: int) -> float:
    return plan.evaluate("tiny", name, ranks, plan.parse(["--block", "16"])).sent_bytes


def test_bytes_are_those_that_the_benchmark_counts(plan: ModuleType) -> None:
    """See test_ddp.py, which finds the same numbers in the buckets."""
    layer, ordinary, skews = 4 * 64 * 64 + 3 * 64 * 128, 2 * 128 * 64 + 5 * 64, 4 * 8 * 120 + 3 * 12 * 120
    weights = 2 * (2 * layer + ordinary)
    assert sent(plan, "adamw ddp", 2) == weights
    assert sent(plan, "poetx ddp", 2) == 4 * 2 * skews + 2 * ordinary
    assert sent(plan, "poetx ddp bf16", 2) == 2 * 2 * skews + 2 * ordinary
    assert sent(plan, "adamw fsdp2", 2) == (2 * weights + 2 * 2 * (layer + 2 * 64)) / 2
    for name in plan.PLANS:
        assert sent(plan, name, 1) == 0
        assert sent(plan, name, 4) == pytest.approx(1.5 * sent(plan, name, 2))


@pytest.mark.parametrize("name", ["tiny", "1b", "3b"])
def test_models_are_those_of_the_benchmark(plan: ModuleType, name: str) -> None:
    import ddp_rank

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ddp_rank.SIZES[name]))
    size = plan.MODELS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == size.converted + size.ordinary
    matrices = [tuple(p.shape) for p in model.model.layers[0].parameters() if p.ndim == 2]
    assert sorted(matrices) == sorted(size.matrices)


def test_the_committed_table_is_what_the_formulas_give(plan: ModuleType, tmp_path: Path) -> None:
    plan.main(["--out", str(tmp_path / "many_gpus.csv")])
    ours, committed = (
        list(csv.reader(path.open())) for path in (tmp_path / "many_gpus.csv", BENCHMARKS / "results" / "many_gpus.csv")
    )
    assert ours == committed


def test_communication_is_hidden_until_it_outlasts_the_backward_pass(plan: ModuleType) -> None:
    fast, slow = (plan.evaluate("3b", "adamw ddp", 8, plan.parse(["--bandwidth", rate])) for rate in ("1e15", "1e9"))
    assert fast.efficiency == 1
    assert slow.step_s == pytest.approx(slow.compute_s / 3 + slow.communication_s)
