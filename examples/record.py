"""What a training run leaves on disk: metrics, checkpoints, and on which machine it ran."""

from __future__ import annotations

import csv
import dataclasses
import gc
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from poetx_compile.machine import facts


@dataclass(frozen=True)
class Row:
    """One line of the metrics.

    Attributes:
        step: optimizer steps made by then.
        train_loss: nats per byte, averaged over the steps since the line before.
        val_loss: the same on held-out files, where it was measured.
        seconds: spent in training steps so far, compilation among them.
        peak_memory: bytes; on a GPU the most that tensors took, elsewhere the most that the process took.
    """

    method: str
    step: int
    tokens: int
    train_loss: float
    val_loss: float | None
    seconds: float
    peak_memory: int


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows(dataclasses.astuple(row) for row in rows)
    temporary.replace(path)


def save_checkpoint(path: Path, content: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write everything, and the CPU's random numbers, as one file: whole, or the one before stays as it was."""
    temporary = path.with_suffix(".tmp")
    torch.save({**content, "rows": [dataclasses.astuple(row) for row in rows], "random": torch.get_rng_state()}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], list[Row]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(content["random"])
    return content, [Row(*row) for row in content["rows"]]


def tokens_per_second(rows: Sequence[Row]) -> float:
    """The median over the spans between rows, so that compilation does not count."""
    rates = [(after.tokens - before.tokens) / (after.seconds - before.seconds) for before, after in pairwise(rows)]
    return median(rates) if rates else rows[-1].tokens / rows[-1].seconds


def forget_peak_memory(device: str) -> None:
    """Let the next run's peak be its own: on a GPU only, since the operating system keeps that of the whole process."""
    torch._dynamo.reset()  # compiled code holds the model that it was made for
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str) -> dict[str, Any]:
    """The device and the versions that a result belongs to."""
    versions = facts(device)
    return {"device": versions.pop("device"), "versions": versions}
