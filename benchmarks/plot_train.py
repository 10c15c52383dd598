"""Pictures of whole training steps, from their CSV: ``python benchmarks/plot_train.py results/train-step-....csv``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import read_csv
from train_rows import Row

_PARTS = {
    "weight_bytes": ("weights", "#3b6ea5"),
    "residual_bytes": ("residuals", "#7fb2d9"),
    "gradient_bytes": ("gradients", "#c8553d"),
    "state_bytes": ("optimizer states", "#d9a441"),
    "rest_bytes": ("activations and scratch", "#b0b0b0"),
}
_OURS, _OTHERS = "#0b5a7a", "#a9a9a9"


def draw(path: Path) -> list[Path]:
    """Draw what the CSV at ``path`` holds, and return the picture's path, beside it; none where nothing was measured."""
    found = read_csv(path, Row)
    last = {(row.point, row.label): row for row, _ in found if row.step_ms is not None}
    if not last:
        return []
    picture = path.with_suffix(".png")
    device = next((machine["device"] for _, machine in found if machine["device"]), "device unknown")
    _figure(list(last.values()), device).savefig(picture, dpi=150)
    return [picture]


def _figure(rows: Sequence[Row], device: str) -> Figure:
    """For each point a line of two: tokens per second, and what the peak of memory is made of."""
    points = list(dict.fromkeys(row.point for row in rows))
    heights = [1 + sum(row.point == point for row in rows) for point in points]
    figure = Figure(figsize=(12, 1.2 + 0.42 * sum(heights) + 0.5 * len(points)), layout="constrained")
    grid = figure.subplots(len(points), 2, squeeze=False, height_ratios=heights)
    for point, (speed, memory) in zip(points, grid):
        here = [row for row in rows if row.point == point]
        _draw_speed(speed, here)
        _draw_memory(memory, here)
        for axes in (speed, memory):
            axes.set_yticks(range(len(here)), [_label(row) for row in here] if axes is speed else [])
            axes.margins(x=0.1)
            axes.invert_yaxis()
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One training step of a Llama, {device}; dotted: the method's floor", fontsize=11)
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _label(row: Row) -> str:
    return f"{row.label} ({row.batch})" if row.fits else row.label


def _draw_speed(axes: Axes, rows: Sequence[Row]) -> None:
    rates = [row.tokens_per_s or 0.0 for row in rows]
    axes.barh(range(len(rows)), rates, 0.7, color=[_OURS if row.method.startswith("poetx") else _OTHERS for row in rows])
    for place, row in enumerate(rows):
        axes.text(rates[place], place, f" {rates[place]:,.0f}", va="center", fontsize=8)
        if row.gap:
            axes.vlines(rates[place] * row.gap, place - 0.35, place + 0.35, colors="black", linestyles=":", linewidth=1.2)
    first = rows[0]
    depth = f", {first.layers} layers" if first.is_cut else ""
    batch = "largest batch that fits (n)" if first.fits else f"batch {first.batch}"
    micro = f", {first.micro} micro-batches" if first.micro > 1 else ""
    axes.set_title(f"{first.size}{depth}, {batch} × {first.seq}{micro}", loc="left", fontsize=11)
    axes.set_xlabel("tokens/s")


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        left = 0.0
        if row.peak_bytes is None:
            continue
        for name, (label, color) in _PARTS.items():
            width = (getattr(row, name) or 0) / 1e9
            axes.barh(place, width, 0.7, left=left, color=color, label=label)
            left += width
        axes.text(left, place, f" {row.peak_bytes / 1e9:.1f}", va="center", fontsize=8)
    axes.set_xlabel("peak memory, GB")


if __name__ == "__main__":
    print("\n".join(str(picture) for argument in sys.argv[1:] for picture in draw(Path(argument))))
