"""The lines of the convergence benchmark's CSV, and which run they belong to."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from rows import parse_value

_KIND = "val_loss/"


@dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """What decides the outcome of a run.

    Attributes:
        recipe: method and options, ``METHOD:option=value:...``, as :mod:`convergence_recipes` writes them.
        steps: of the whole run; the learning rate depends on it.
        batch, seq: windows a step, and tokens a window.
    """

    size: str
    recipe: str
    seed: int
    steps: int
    batch: int
    seq: int

    @property
    def label(self) -> str:
        return f"{self.size} {self.recipe}, {self.steps} steps of {self.batch} x {self.seq}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One moment of a run.

    Attributes:
        step: optimizer steps made by then.
        tokens, epochs: seen in training by then.
        train_loss: nats per token, the mean of the steps since the row before.
        val_loss: the same on all validation windows, where it was measured; ``by_kind`` for each kind of text.
        lr: the rate of the last step.
        seconds: spent in training steps so far, compilation among them, validation not.
        tokens_per_s: since the row before; other runs on the same device slow it down.
        peak_bytes: the most that tensors took on the device; None on a CPU.
        jobs: runs that shared the device, at most.
        end: ``finished``, ``diverged``, or empty while the run goes on.
    """

    step: int
    tokens: int
    epochs: float
    train_loss: float
    val_loss: float | None
    lr: float
    seconds: float
    tokens_per_s: float
    peak_bytes: int | None
    jobs: int
    end: str
    by_kind: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row, its run, and the machine on which it was measured."""

    key: Key
    row: Row
    machine: Mapping[str, str | None]

    def plain(self) -> dict[str, Any]:
        return {"key": dataclasses.asdict(self.key), "row": dataclasses.asdict(self.row), "machine": dict(self.machine)}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Line:
        return cls(Key(**plain["key"]), Row(**plain["row"]), plain["machine"])


_KEYS, _ROWS = get_type_hints(Key), {name: hint for name, hint in get_type_hints(Row).items() if name != "by_kind"}


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """Write all lines: the whole file, or the one before stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = [
        dataclasses.asdict(line.key)
        | {name: _short(getattr(line.row, name)) for name in _ROWS}
        | {_KIND + kind: _short(loss) for kind, loss in line.row.by_kind.items()}
        | dict(line.machine)
        for line in lines
    ]
    kinds = sorted({_KIND + kind for line in lines for kind in line.row.by_kind})
    machines = dict.fromkeys(name for line in lines for name in line.machine)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*_KEYS, *_ROWS, *kinds, *machines])
        writer.writeheader()
        writer.writerows(flat)
    temporary.replace(path)


def read_csv(path: Path) -> list[Line]:
    """All lines of a file; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_line(texts) for texts in csv.DictReader(file)]


def merged(before: Iterable[Line], now: Iterable[Line]) -> list[Line]:
    """The lines of all runs, sorted: where both know a run, those that went further."""
    runs: dict[Key, list[Line]] = {}
    for lines in (by_run(before), by_run(now)):
        for key, found in lines.items():
            if key not in runs or found[-1].row.step >= runs[key][-1].row.step:
                runs[key] = found
    return [line for key in sorted(runs) for line in runs[key]]


def by_run(lines: Iterable[Line]) -> dict[Key, list[Line]]:
    """The lines of each run, in their order."""
    runs: dict[Key, list[Line]] = {}
    for line in lines:
        runs.setdefault(line.key, []).append(line)
    return runs


def _line(texts: Mapping[str, str]) -> Line:
    key = Key(**{name: hint(texts[name]) for name, hint in _KEYS.items()})
    kinds = {name[len(_KIND) :]: float(text) for name, text in texts.items() if name.startswith(_KIND) and text}
    row = Row(**{name: parse_value(hint, texts[name]) for name, hint in _ROWS.items()}, by_kind=kinds)
    others = {name: text for name, text in texts.items() if not name.startswith(_KIND) and name not in {*_KEYS, *_ROWS}}
    return Line(key, row, others)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
