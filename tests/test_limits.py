"""Known limits: when one of them falls, its test says so, and the table in docs/compatibility.md can lose a line."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from limits import LIMITS, Limit
from torch import nn

from poetx_compile import report
from poetx_compile.report import Row

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "block_size": 16, "include_conv": True}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
    pytest.mark.filterwarnings("ignore:poetx. .* no torch.optim.Optimizer holds it"),
]


def account(limit: Limit) -> tuple[nn.Module, Row]:
    """The model after a backward pass, and the report's line on the weight in question."""
    model = limit.make()
    if limit.whole:
        compiled: Any = torch.compile(model, backend="poetx", options=OPTIONS)
    else:
        model.compile(backend="poetx", options=OPTIONS)
        compiled = model
    compiled(torch.randn(limit.shape)).square().sum().backward()
    return model, next(row for row in report(model, show=False).rows if row.name == limit.weight)


HERE = [limit for limit in LIMITS if sys.version_info < limit.before]


@pytest.mark.parametrize(
    "limit", [pytest.param(limit, marks=pytest.mark.xfail(strict=True, reason=limit.sentence)) for limit in HERE], ids=str
)
def test_is_rotated(limit: Limit) -> None:
    assert account(limit)[1].converted


@pytest.mark.parametrize("limit", HERE, ids=str)
def test_the_report_says_why_not_and_the_weight_trains_as_before(limit: Limit) -> None:
    model, row = account(limit)
    assert row.how == f"ordinary: {limit.sentence}"
    weight = model.get_parameter(limit.weight)
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
