"""The lines of the layer benchmark's CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING, UPDATE = "forward+backward", "update"
BASELINES = {TRAINING: "linear", UPDATE: "adamw"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one point.

    Attributes:
        what: ``forward+backward`` of one layer, or ``update`` of one weight.
        block: channels that rotate together, where the method has blocks.
        m, n: outputs and inputs of the layer.
        tokens: rows of its input; None for an update.
        ms_median, ms_q20, ms_q80: milliseconds, with the quantiles at 20 and 80 %.
        timed_by: ``graph``, ``events`` or ``clock``.
        flops, bytes: of the matrix products, and moved at least.
        floor_ms: milliseconds that these take at the device's peak rates.
        ratio_to_baseline: ``ms_median`` over that of ``linear`` or ``adamw`` at the same point.
        peak_mib: MiB at the peak of a forward and backward pass, above what was allocated before.
        reason: why there is no time.
    """

    what: str
    method: str
    block: int | None
    m: int
    n: int
    tokens: int | None
    ms_median: float | None = None
    ms_q20: float | None = None
    ms_q80: float | None = None
    timed_by: str = ""
    flops: int
    bytes: int
    floor_ms: float | None
    ratio_to_baseline: float | None = None
    peak_mib: float | None = None
    reason: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def point(self) -> tuple[str, int, int, int | None]:
        return self.what, self.m, self.n, self.tokens

    @property
    def label(self) -> str:
        return self.method if self.block is None else f"{self.method}, {self.block}"


def floor_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """The ratio that would come out if the method and its baseline both took their floor."""
    for other in rows:
        if other.point == row.point and other.method == BASELINES[row.what] and other.floor_ms and row.floor_ms:
            return row.floor_ms / other.floor_ms
    return None


def read_csv(path: Path) -> tuple[list[Row], str]:
    """The rows, and the name of the device."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [Row(**{name: _parse(name, line[name]) for name in _COLUMNS}) for line in lines]
    return rows, lines[0]["device"]


_COLUMNS = [field.name for field in dataclasses.fields(Row)]
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("what", "method", "timed_by", "reason"), str),
    **dict.fromkeys(("block", "m", "n", "tokens", "flops", "bytes"), int),
}


def _parse(name: str, text: str) -> Any:
    read = _TYPES.get(name, float)
    return None if not text and read is not str else read(text)
