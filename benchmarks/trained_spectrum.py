"""What training makes of singular values: a recipe of ``convergence.py``, and the spectra of the layers before and after.

python benchmarks/trained_spectrum.py --corpus DIR --run muon:dtype=autocast:lr=1.6e-2:ratio=0.5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from convergence_recipes import SIZES, Recipe
from convergence_rows import Key
from convergence_run import Case, Run
from rich.console import Console
from rich.table import Table
from rows import append_csv
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
SHAPE = {"largest": 0.0, "upper": 0.25, "middle": 0.5, "lower": 0.75}
"""Which singular values tell the shape of a spectrum: parts of their order."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One matrix of one run.

    Attributes:
        growth: its norm at the end over that at the start.
        largest, upper, middle, lower: the largest singular value at the end, and those at a quarter, half and three quarters
            of the order, over their root mean square.
        largest_before, upper_before, middle_before, lower_before: the same at the start.
        val_loss: of the run.
    """

    recipe: str
    size: str
    steps: int
    matrix: str
    growth: float
    largest: float
    upper: float
    middle: float
    lower: float
    largest_before: float
    upper_before: float
    middle_before: float
    lower_before: float
    val_loss: float | None


def spectra(module: nn.Module) -> dict[str, Tensor]:
    """The singular values of the matrices of the layers, by name, float64."""
    return {
        name.removesuffix(".weight"): torch.linalg.svdvals(parameter.detach().double()).cpu()
        for name, parameter in module.named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }


def shape(values: Tensor) -> dict[str, float]:
    scaled = values / values.square().mean().sqrt()
    return {name: scaled[int(part * (len(values) - 1))].item() for name, part in SHAPE.items()}


def compare(case: Case, before: Mapping[str, Tensor], after: Mapping[str, Tensor], loss: float | None) -> Iterator[Row]:
    for name, values in after.items():
        yield Row(
            recipe=case.key.recipe,
            size=case.key.size,
            steps=case.key.steps,
            matrix=name,
            growth=(torch.linalg.vector_norm(values) / torch.linalg.vector_norm(before[name])).item(),
            val_loss=loss,
            **shape(values),
            **{f"{part}_before": value for part, value in shape(before[name]).items()},
        )


def show(rows: Sequence[Row]) -> None:
    table = Table(title="Norm at the end over the start; singular values over their root mean square", title_justify="left")
    for heading in ("matrix", "growth", "largest", "1/4", "1/2", "3/4", "before: largest", "1/4", "1/2", "3/4"):
        table.add_column(heading, justify="right")
    for kind in sorted({row.matrix.rpartition(".")[2] for row in rows}):
        of_kind = [row for row in rows if row.matrix.endswith(kind)]
        names = ("growth", *SHAPE, *(f"{name}_before" for name in SHAPE))
        table.add_row(kind, *(f"{sum(getattr(row, name) for row in of_kind) / len(of_kind):.2f}" for name in names))
    Console().print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="as convergence.py takes it")
    parser.add_argument("--run", type=Recipe.parse, required=True, metavar="METHOD:option=value")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--out", type=Path, default=RESULTS / "trained-spectrum.csv", help="rows are added to it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    key = Key(size=args.size, recipe=str(args.run), seed=0, steps=args.steps, batch=args.batch, seq=args.seq)
    with tempfile.TemporaryDirectory() as state:
        deadline = time.time() + 1e9
        case = Case(key, str(args.corpus), state, args.device, deadline, eval_every=args.steps, compiler=args.compiler)
        run = Run(case)
        before = spectra(run.trained.module)
        run.train()
    rows = list(compare(case, before, spectra(run.trained.module), run.lines[-1].row.val_loss))
    for row in rows:
        append_csv(args.out, row, run.machine)
    show(rows)


if __name__ == "__main__":
    main()
