"""Pictures of convergence, from the CSV: ``python benchmarks/plot_convergence.py results/convergence-....csv [SUITE]``."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from convergence_recipes import Recipe
from convergence_rows import Key, Line, by_run, read_csv
from convergence_suites import SUITES
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MOST_FAMILIES = 12
_ROOM_ABOVE = 0.8

Losses = list[tuple[float, float]]
Family = list[tuple[float, Losses]]
"""Learning rates, each with millions of tokens and validation losses."""


def draw(path: Path, suite: str = "") -> list[Path]:
    """Draw what the CSV holds, one picture beside it for each size, horizon and seed; gives their paths.

    Args:
        suite: a question of ``convergence_suites.py``, whose recipes alone are drawn; all without.
    """
    wanted = {str(Recipe.parse(text)) for text in SUITES[suite].recipes} if suite else None
    points: dict[Key, dict[str, Family]] = defaultdict(lambda: defaultdict(list))
    for key, lines in by_run(read_csv(path)).items():
        if lines[-1].row.end == "finished" and (wanted is None or key.recipe in wanted):
            losses = _losses(lines)
            recipe = Recipe.parse(key.recipe)
            points[replace(key, recipe="")][recipe.family].append((recipe["lr"], losses))
    stem = "-".join(filter(None, (path.stem, suite)))
    return [
        _picture(path.with_name(f"{stem}-{point.size}-{point.steps}-{point.seed}.png"), point, families)
        for point, families in sorted(points.items())
    ]


def _picture(picture: Path, point: Key, families: Mapping[str, Family]) -> Path:
    best = {name: min(runs, key=lambda run: run[1][-1][1]) for name, runs in families.items()}
    shown = sorted(best, key=lambda name: best[name][1][-1][1])[:_MOST_FAMILIES]
    lowest = min(losses[-1][1] for _, losses in best.values())
    grid = any(len(families[name]) > 1 for name in shown)
    figure = Figure(figsize=(13 if grid else 9, 6.5), layout="constrained")
    over_tokens, *over_rates = figure.subplots(1, 1 + grid, squeeze=False)[0]
    for number, name in enumerate(shown):
        rate, losses = best[name]
        label = f"{name}: {losses[-1][1]:.3f} at lr {rate:g}"
        over_tokens.plot(*zip(*losses), color=colormaps["tab20"](number), marker=".", label=label)
    over_tokens.set_ylim(lowest - 0.05, lowest + 2 * _ROOM_ABOVE)
    over_tokens.set_xlabel("training tokens (millions)")
    _tidy(over_tokens)
    title = f"Llama {point.size}, {point.steps} steps of {point.batch} × {point.seq} tokens, seed {point.seed}"
    if grid:
        title += ": each recipe at its best rate, and the last loss over the rate"
        _draw_rates(over_rates[0], [families[name] for name in shown], lowest)
    figure.suptitle(title, fontsize=11)
    figure.legend(*over_tokens.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(picture, dpi=110)
    return picture


def _draw_rates(axes: Axes, families: list[Family], lowest: float) -> None:
    for number, family in enumerate(families):
        ends = sorted((rate, losses[-1][1]) for rate, losses in family)
        axes.plot(*zip(*ends), color=colormaps["tab20"](number), marker="o", markersize=4)
    highest = max(losses[-1][1] for family in families for _, losses in family)
    axes.set_ylim(lowest - 0.05, min(highest, lowest + _ROOM_ABOVE) + 0.05)
    axes.set_xscale("log")
    axes.set_xlabel("highest learning rate")
    _tidy(axes)


def _losses(lines: list[Line]) -> Losses:
    return [(line.row.tokens / 1e6, line.row.val_loss) for line in lines if line.row.val_loss is not None]


def _tidy(axes: Axes) -> None:
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print("\n".join(str(picture) for picture in draw(Path(sys.argv[1]), *sys.argv[2:])))
