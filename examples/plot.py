"""The picture of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import Row

_STYLES = {"poetx": ("#0b6e99", "POET-X"), "skewmuon": ("#3a8f5c", "POET-X, SkewMuon"), "adamw": ("#c8553d", "AdamW")}
_NEIGHBOURS = 2


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Plot the loss of each method over the tokens it saw: training thin and smoothed, held-out files as dots."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for method, part in groupby(rows, key=lambda row: row.method):
        _draw_method(axes, *_STYLES[method], list(part))
    axes.set_ylim(top=1.15 * max(row.val_loss for row in rows if row.val_loss is not None))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per byte)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per byte")
    bits.spines["right"].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_method(axes: Axes, color: str, label: str, rows: list[Row]) -> None:
    tokens, losses = [row.tokens / 1e6 for row in rows], [row.train_loss for row in rows]
    axes.plot(tokens, _smooth(losses), color=color, alpha=0.5, linewidth=1, label=f"{label}, training")
    measured = [(row.tokens / 1e6, row.val_loss) for row in rows if row.val_loss is not None]
    last = measured[-1][1]
    axes.plot(
        *zip(*measured), color=color, marker="o", markersize=4, label=f"{label}, held-out files: {last:.3f} at the end"
    )


def _smooth(values: list[float]) -> list[float]:
    """Each value averaged with its neighbours on both sides."""
    windows = [values[max(0, here - _NEIGHBOURS) : here + _NEIGHBOURS + 1] for here in range(len(values))]
    return [sum(window) / len(window) for window in windows]
