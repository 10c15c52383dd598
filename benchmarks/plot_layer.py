"""Pictures of the layer benchmark, from its CSV: ``python benchmarks/plot_layer.py results/layer-....csv``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from layer_rows import BASELINES, TRAINING, UPDATE, Row, floor_ratio, read_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_COLORS = {
    "poetx": ("#8cc5d9", "#3b93b3", "#0b5a7a"),
    "poetx, even steps": ("#9fd6c4", "#4fa88d", "#1f6b54"),
    "poetx with AdamW on q": ("#d3e0a8", "#a3b35f", "#6b7a2e"),
    "poetx with AdamW on q, even steps": ("#b7d3a8", "#7aa35f", "#466b2e"),
    "official-fast": ("#b79ad1", "#8a63b0", "#5b3684"),
    "official-mem": ("#d9a5c2", "#b5628f", "#843763"),
    "official-adamw": ("#d6c08a", "#b0913f", "#7a6120"),
    "official-merge": ("#b0b0b0", "#808080", "#505050"),
}
"""A hue for each method, from pale to dark with the block size."""

_BASELINE = "#c8553d"


def draw(path: Path) -> list[Path]:
    """Draw what the CSV at ``path`` holds, and return the pictures' paths, beside it."""
    rows, device = read_csv(path)
    pictures = []
    for what, ending, paint in ((TRAINING, "ratio", _draw_layers), (UPDATE, "update", _draw_updates)):
        part = [row for row in rows if row.what == what]
        if any(row.ratio_to_baseline for row in part):
            picture = path.with_name(f"{path.stem}-{ending}.png")
            paint(part, device).savefig(picture, dpi=150)
            pictures.append(picture)
    return pictures


def _draw_layers(rows: Sequence[Row], device: str) -> Figure:
    """For each shape the ratio over the tokens; dotted, the ratio of the floors."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    across = min(3, len(shapes))
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(0.6 + 4.2 * across, 1.2 + 3.2 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in list(grid.flat)[len(shapes) :]:
        axes.set_axis_off()
    for shape, axes in zip(shapes, grid.flat):
        here = [row for row in rows if row.shape == shape]
        for label in _labels(rows):
            _draw_line(axes, [row for row in here if row.label == label], rows)
        tokens = sorted({row.tokens for row in here if row.tokens})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(tokens))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.set_xlabel("tokens")
        _style(axes, f"{shape[0]} × {shape[1]}")
    for axes in grid[:, 0]:
        axes.set_ylabel("time / time of linear")
    figure.suptitle(f"Forward and backward of one layer, {device}; dotted: ratio of the floors", fontsize=11)
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_line(axes: Axes, rows: Sequence[Row], everything: Sequence[Row]) -> None:
    timed = [(row.tokens, row.ratio_to_baseline) for row in rows if row.tokens and row.ratio_to_baseline]
    if not timed:
        return
    color = _color(rows[0], everything)
    axes.plot(*zip(*timed), color=color, marker="o", markersize=4, label=_name(rows[0]))
    least = [(row.tokens, floor) for row in rows if row.tokens and (floor := floor_ratio(row, everything))]
    if least:
        axes.plot(*zip(*least), color=color, linestyle=":", marker=".", markersize=3)


def _draw_updates(rows: Sequence[Row], device: str) -> Figure:
    """For each shape a bar a method; dotted, the ratio of the floors."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    labels = _labels(rows)
    figure = Figure(figsize=(1.5 + 2.1 * max(2, len(shapes)), 4.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for place, label in enumerate(labels):
        part = [row for row in rows if row.label == label and row.ratio_to_baseline]
        middles = [shapes.index(row.shape) + (place + 0.5) * width - 0.4 for row in part]
        if not part:
            continue
        heights = [row.ratio_to_baseline or 0.0 for row in part]
        axes.bar(middles, heights, 0.9 * width, color=_color(part[0], rows), label=_name(part[0]))
        for middle, row in zip(middles, part):
            if floor := floor_ratio(row, rows):
                axes.hlines(floor, middle - 0.5 * width, middle + 0.5 * width, colors="black", linestyles=":", linewidth=1.2)
    axes.set_xticks(range(len(shapes)), [f"{m} × {n}" for m, n in shapes])
    axes.set_ylabel("time / time of AdamW")
    _style(axes, f"Update of one weight, {device}; dotted: ratio of the floors")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.label for row in rows if row.method != BASELINES[row.what]))


def _name(row: Row) -> str:
    return f"{row.method}, blocks of {row.block}"


def _color(row: Row, rows: Sequence[Row]) -> str:
    blocks = sorted({other.block for other in rows if other.block})
    shades = _COLORS[row.method]
    return shades[min(blocks.index(row.block or 0) if len(blocks) > 1 else 1, len(shades) - 1)]


def _style(axes: Axes, title: str) -> None:
    axes.axhline(1.0, color=_BASELINE, linewidth=1)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print("\n".join(str(picture) for argument in sys.argv[1:] for picture in draw(Path(argument))))
