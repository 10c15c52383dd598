"""What the package's estimator says of a case of the whole-model benchmark, on CPU: ``train_step.py --plan`` starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama
import torch
from torch import Tensor, nn
from train_run import Case

from poetx_compile.config import split_options
from poetx_compile.estimate import Estimate, estimate, trace
from poetx_compile.stepper import Stepper

PLANNED = ("poetx", "adamw")


def planned(case: Case) -> Estimate | None:
    """Memory at the peak of a step, with fused AdamW; the device of the case is not asked.

    None for what the estimator does not know: another method, Inductor's own options and modes, several micro-batches.
    """
    spec = case.spec
    if spec.name not in PLANNED or case.micro > 1:
        return None
    settings, patches = split_options(spec.backend_options, spec.mode)
    if patches:
        return None

    def build() -> nn.Module:
        return spec.configured(llama.build(case.shape, case.seq, torch.device("cpu")))

    def loss(model: Callable[..., Any]) -> Tensor:
        ids = torch.zeros(case.batch, case.seq, dtype=torch.int64)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    traced = trace(build, loss, settings if spec.name == "poetx" else None, case.shape.vocabulary)
    return estimate(traced, settings.residual_bits, Stepper(is_fused=True))


def planned_bytes(case: Case) -> int | None:
    found = planned(case)
    return None if found is None else found.total


def main(case_text: str, out: str) -> None:
    Path(out).write_text(json.dumps(planned_bytes(Case(**json.loads(case_text)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
