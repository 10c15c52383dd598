"""What the rotations of a run did: each number of :class:`poetx_compile.Metrics`, as a table and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import poetx_compile

Point = tuple[int, str, float]

_PANELS = {
    "angle": "angle of a step (radians)",
    "tangent": "norm of the gradient",
    "orthogonality": "largest entry of GᵀG − I",
    "spectrum_drift": "drift of singular values, over the largest",
    "retraction_seconds": "retraction (seconds)",
}


class Watch:
    """Collects metrics at some steps of one run, and writes ``rotations.csv`` and ``rotations.png``."""

    def __init__(self, model: nn.Module, out: Path, done: int) -> None:
        """Args:
        out: the output folder, which may hold the table of a run that is resumed.
        done: steps of that run that count.
        """
        self._metrics = poetx_compile.Metrics(model)
        self._path = out / "rotations.csv"
        self._points = [point for point in _read(self._path) if point[0] <= done] if done else []
        self._is_new = True

    def note(self, step: int, *, is_milestone: bool) -> None:
        """Keep the numbers of the step that was just made.

        At milestones also how far singular values moved since the first call, which takes long.
        """
        drift = self._metrics.spectrum_drift() if is_milestone or self._is_new else {}
        self._is_new = False
        self._points += [(step, name.removeprefix("poetx/"), value) for name, value in (self._metrics.last | drift).items()]

    def save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "metric", "value"))
            writer.writerows(self._points)
        temporary.replace(self._path)
        draw(self._path.with_suffix(".png"), self._points)


def _read(path: Path) -> list[Point]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(line["step"]), line["metric"], float(line["value"])) for line in csv.DictReader(file)]


def draw(path: Path, points: list[Point]) -> None:
    """Each kind of number over the steps: all weights thin, their median bold."""
    found = {kind: [point for point in points if point[1].split("/")[0] == kind] for kind in _PANELS}
    kinds = [kind for kind in _PANELS if found[kind]]
    figure = Figure(figsize=(8, 2 * len(kinds)), layout="constrained")
    all_axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(all_axes, kinds):
        _draw_kind(axes, found[kind])
        axes.set_title(_PANELS[kind], loc="left", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def _draw_kind(axes: Axes, points: list[Point]) -> None:
    names = list(dict.fromkeys(name for _, name, _ in points))
    steps = sorted({step for step, _, _ in points})
    if len(names) > 1:
        for name in names:
            line = [(step, value) for step, other, value in points if other == name]
            axes.plot(*zip(*line), color="#0b6e99", alpha=0.2, linewidth=0.7)
    middle = [median(value for at, _, value in points if at == step) for step in steps]
    axes.plot(steps, middle, color="#0b6e99", linewidth=1.8)
    if min(value for _, _, value in points) > 0:
        axes.set_yscale("log")
