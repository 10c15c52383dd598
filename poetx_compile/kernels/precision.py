"""Full float32 products, whatever the user chose for the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32")

UNIT = 4096.0
"""Rotations in float16 are stored this many times larger: 11 bits of numbers from 1.5e-8 to 16."""


def unscaled(rotation: Tensor) -> Tensor:
    """``E``, of the dtype that it is computed in, from ``E`` or from what stands for it in float16."""
    return rotation.float() / UNIT if rotation.dtype == torch.float16 else rotation


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run float32 matrix products in IEEE float32, outside autocast.

    Folding in TF32 loses three digits a step that rotations never restore. torch keeps this choice twice, by an old and
    a new interface, and refuses to multiply where they disagree: both are set, and both put back.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None  # only the new interface is in use
    if legacy:
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if legacy:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, chosen):
            backend.fp32_precision = "none"  # as before where it follows a wider setting
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
