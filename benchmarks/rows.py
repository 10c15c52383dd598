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
    _write(path, [*_columns(rows[0]), *machine], [_line(row, machine) for row in rows])


def append_csv(path: Path, row: Any, machine: Machine) -> None:
    """Add a line to a file, which may be new. Where nothing is known of the machine, its columns stay empty.

    A file from before some field with a default was added is written anew: its lines have the default there.

    Raises:
        ValueError: the file has other columns.
    """
    machine = {**dict.fromkeys(facts(torch.device("cpu"))), **machine}
    columns = [*_columns(row), *machine]
    if not path.exists():
        write_csv(path, [row], machine)
        return
    with path.open("r+", newline="") as file:
        reader = csv.DictReader(file)
        header, lines = list(reader.fieldnames or []), list(reader)
        if header == columns:
            file.seek(0, 2)
            csv.writer(file).writerow(_line(row, machine).values())
            return
    defaults = _defaults(type(row))
    if other := sorted({*header} - {*columns} | {*columns} - {*header, *defaults}):
        raise ValueError(f"{path} has other columns ({', '.join(other)}): give another file")
    _write(path, columns, [*({**defaults, **line} for line in lines), _line(row, machine)])


def read_csv(path: Path, kind: type[Row]) -> list[tuple[Row, dict[str, str]]]:
    """Rows, each with the machine it came from. A column that the file lacks has its field's default.

    Raises:
        TypeError: it lacks one without a default.
    """
    hints = get_type_hints(kind)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        (
            kind(**{name: parse_value(hint, line[name]) for name, hint in hints.items() if name in line}),
            {name: text for name, text in line.items() if name not in hints},
        )
        for line in lines
    ]


def _columns(row: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(row)]


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}


def _line(row: Any, machine: Machine) -> dict[str, Any]:
    return dict(zip([*_columns(row), *machine], [*dataclasses.astuple(row), *machine.values()]))


def _write(path: Path, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(path)


def parse_value(hint: Any, text: str) -> Any:
    """What a cell of a CSV says, as a dataclass's field of that type."""
    kinds = get_args(hint) or (hint,)
    return None if not text and NoneType in kinds else kinds[0](text)
