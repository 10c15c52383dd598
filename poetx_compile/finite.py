"""Telling the user of non-finite rotations without making the device wait."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict

import torch
from torch import Tensor

from .errors import PoetxWarning
from .factor import OrthogonalFactor

_Question = tuple[Tensor, torch.cuda.Event | None, list[weakref.ref[OrthogonalFactor]]]


class FiniteWatch:
    """Looks at each step's ``q``. On a GPU the answer is read one step later, when it has arrived."""

    def __init__(self) -> None:
        self._asked: list[_Question] = []
        self._told: weakref.WeakSet[OrthogonalFactor] = weakref.WeakSet()

    def look(self, stepped: list[OrthogonalFactor]) -> None:
        """Ask about these factors' ``q``, and warn of what earlier answers say."""
        by_device: dict[torch.device, list[OrthogonalFactor]] = defaultdict(list)
        for factor in stepped:
            by_device[factor.q.device].append(factor)
        with torch.no_grad():
            for device, group in by_device.items():
                asked = [weakref.ref(factor) for factor in group]
                sizes = torch.stack(torch._foreach_norm([factor.q for factor in group]))
                if device.type == "cuda":
                    arrived = torch.cuda.Event()
                    answer = sizes.to("cpu", non_blocking=True)
                    arrived.record(torch.cuda.current_stream(device))
                    self._asked.append((answer, arrived, asked))
                else:
                    self._asked.append((sizes, None, asked))
        self._read()

    def _read(self) -> None:
        waiting: list[_Question] = []
        for answer, arrived, asked in self._asked:
            if arrived is None or arrived.query():
                bad = [factor() for factor, size in zip(asked, answer.tolist()) if not size < float("inf")]
                self._tell([factor for factor in bad if factor is not None])
            else:
                waiting.append((answer, arrived, asked))
        self._asked = waiting

    def _tell(self, bad: list[OrthogonalFactor]) -> None:
        fresh = [factor for factor in bad if factor not in self._told]
        self._told.update(fresh)
        if fresh:
            others = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
            warnings.warn(
                f"poetx: the step of '{fresh[0].name}'{others} was NaN or infinite; its weight was left as it was where that "
                "happened. The optimizer's state may hold such numbers now: resume from a checkpoint with a lower learning rate, "
                "or clip gradients",
                PoetxWarning,
                stacklevel=2,
            )
