"""Picture of the benchmark of several GPUs, from its CSV: ``python benchmarks/plot_ddp.py results/ddp-....csv``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ddp_rows import Row, read_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLORS = {
    "poetx": "#3b93b3",
    "poetx, bf16 gradients": "#0b5a7a",
    "adamw": "#c8553d",
    "fsdp2": "#b0913f",
}


def draw(path: Path) -> Path:
    """Draw tokens/s of each GPU and the bytes that it sends: of cases of one label the fastest. Returns the picture's path."""
    rows = [row for row in read_csv(path) if row.ms_median]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    speed, wire = figure.subplots(1, 2)
    most = max((row.ranks for row in rows), default=1)
    _bars(speed, rows, lambda row: row.tokens_per_second, "tokens/s of each GPU")
    _bars(
        wire,
        [row for row in rows if row.ranks == most],
        lambda row: (row.wire_bytes or 0) / 1e6,
        "MB sent by a GPU in a step",
    )
    device = next((row.facts["device"] for row in rows), "")
    figure.suptitle(f"Llama on {most} × {device}; pale: on one", fontsize=11)
    handles = {text: handle for axes in (speed, wire) for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return picture


def _bars(axes: Axes, rows: Sequence[Row], height: Callable[[Row], float | None], title: str) -> None:
    models = list(dict.fromkeys(_model(row) for row in rows))
    bars = list(dict.fromkeys((row.label, row.ranks) for row in rows))
    width = 0.8 / max(len(bars), 1)
    for place, (label, ranks) in enumerate(bars):
        part = [row for row in rows if (row.label, row.ranks) == (label, ranks)]
        fastest = {_model(row): row for row in sorted(part, key=lambda row: row.tokens_per_second or 0.0)}
        middles = [models.index(model) + (place + 0.5) * width - 0.4 for model in fastest]
        alpha = 0.45 if ranks == 1 else 1.0
        shown = {} if ranks == 1 else {"label": label}
        heights = [height(row) or 0.0 for row in fastest.values()]
        axes.bar(middles, heights, 0.9 * width, color=_COLORS[label], alpha=alpha, **shown)
    axes.set_xticks(range(len(models)), models)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _model(row: Row) -> str:
    return f"{row.model}, {row.batch} × {row.seq}"


if __name__ == "__main__":
    print("\n".join(str(draw(Path(argument))) for argument in sys.argv[1:]))
