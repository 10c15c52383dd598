"""CSV files of results: a dataclass for a line, and beside it the machine on which it was measured."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from poetx_compile import machine

Row = TypeVar("Row")
Machine = Mapping[str, "str | None"]


def facts(device: torch.device, *packages: str) -> dict[str, str | None]:
    """The machine, the versions of some more packages, and the date."""
    return {**machine.facts(device, *packages), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def write_csv(path: Path, rows: Sequence[Any], machine: Machine) -> None:
    """Write rows of one dataclass, all of one machine: the whole file, or the one before stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_columns(rows[0]), *machine])
        writer.writerows([*dataclasses.astuple(row), *machine.values()] for row in rows)
    temporary.replace(path)


def append_csv(path: Path, row: Any, machine: Machine) -> None:
    """Add a line to a file, which may be new. Where nothing is known of the machine, its columns stay empty.

    Raises:
        ValueError: the file has other columns.
    """
    machine = {**dict.fromkeys(facts(torch.device("cpu"))), **machine}
    columns = [*_columns(row), *machine]
    if not path.exists():
        write_csv(path, [row], machine)
        return
    with path.open("r+", newline="") as file:
        header = next(csv.reader(file), [])
        if header != columns:
            other = ", ".join(sorted(set(header) ^ set(columns))) or "their order"
            raise ValueError(f"{path} has other columns ({other}): give another file")
        file.seek(0, 2)
        csv.writer(file).writerow([*dataclasses.astuple(row), *machine.values()])


def read_csv(path: Path, kind: type[Row]) -> list[tuple[Row, dict[str, str]]]:
    """Rows, each with the machine it came from."""
    hints = get_type_hints(kind)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        (
            kind(**{name: parse_value(hint, line[name]) for name, hint in hints.items()}),
            {name: text for name, text in line.items() if name not in hints},
        )
        for line in lines
    ]


def _columns(row: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(row)]


def parse_value(hint: Any, text: str) -> Any:
    """What a cell of a CSV says, as a dataclass's field of that type."""
    kinds = get_args(hint) or (hint,)
    return None if not text and NoneType in kinds else kinds[0](text)
