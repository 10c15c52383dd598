"""A picture of the spectrum benchmark, from its CSV: ``python benchmarks/plot_spectrum.py results/spectrum-....csv``."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from spectrum_rows import read_csv

_COLORS = {"float32": "#555555", "bfloat16": "#3b93b3", "float16": "#8a63b0"}
_LINES = {None: "-", 8: "-", 4: "--", 0: ":"}
_LEAN = {"int8": "-.", "bf16-lean": (0, (1, 4))}
_PANELS = {
    "norm_drift": "norm, |change|",
    "spectrum_drift": "largest change of a singular value",
    "distance": "distance to float64",
}


def draw(path: Path) -> Path:
    """Draw what the CSV at ``path`` holds, and return the picture's path, beside it."""
    rows, machine = read_csv(path)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items()):
        for label in dict.fromkeys(row.label for row in rows):
            line = [row for row in rows if row.label == label and row.step]
            values = [abs(getattr(row, name)) for row in line]
            style = {"color": _COLORS[line[0].dtype], "linestyle": _LEAN.get(line[0].storage, _LINES[line[0].bits])}
            axes.loglog([row.step for row in line], values, label=label, **style)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("steps")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Rounding of a {machine['shape']} weight, blocks of {machine['block']}, {machine['angle']} rad a step, "
        f"{machine['device']}; relative",
        fontsize=11,
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return picture


if __name__ == "__main__":
    print("\n".join(str(draw(Path(argument))) for argument in sys.argv[1:]))
