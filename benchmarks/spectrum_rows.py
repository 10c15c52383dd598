"""The lines of the spectrum benchmark's CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight after some steps; all numbers are relative.

    Attributes:
        dtype: of the weight.
        bits: of the residual; None where the weight needs none.
        storage: ``folded``, or that of a lean weight.
        norm_drift: of the Frobenius norm, since the start.
        spectrum_drift: the largest change of a singular value, over the largest singular value.
        spectrum_drift_rms: the norm of all changes of singular values, over the norm of the weight.
        smallest: the smallest singular value, over the largest at the start.
        distance: to the float64 weight that took the same rotations, over its norm.
    """

    dtype: str
    bits: int | None
    step: int
    norm_drift: float
    spectrum_drift: float
    spectrum_drift_rms: float
    smallest: float
    distance: float
    storage: str = "folded"

    @property
    def label(self) -> str:
        if self.storage != "folded":
            return f"{self.dtype}, {self.storage}"
        return self.dtype if self.bits is None else f"{self.dtype}, {self.bits} bits"


_COLUMNS = [field.name for field in dataclasses.fields(Row)]


def write_csv(path: Path, rows: Sequence[Row], machine: Mapping[str, str | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *machine])
        for row in rows:
            numbers = (f"{value:.4g}" if isinstance(value, float) else value for value in dataclasses.astuple(row))
            writer.writerow([*numbers, *machine.values()])


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows, and what else stands in the first line: device, versions, settings."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [
        Row(
            dtype=line["dtype"],
            bits=int(line["bits"]) if line["bits"] else None,
            step=int(line["step"]),
            **{name: float(line[name]) for name in _COLUMNS[3:-1]},
            storage=line.get("storage", "folded"),
        )
        for line in lines
    ]
    return rows, {name: value for name, value in lines[0].items() if name not in _COLUMNS}
