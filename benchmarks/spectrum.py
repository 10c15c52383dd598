"""What rounding does to a rotated weight over many steps: drift of its norm and of its singular values.

    python benchmarks/spectrum.py                                     # 10,000 steps of a 256 x 256 weight
    python benchmarks/spectrum.py --shape 1024x1024 --device cuda --dtypes bfloat16 --bits 8,0 --angle 1e-3
    python benchmarks/spectrum.py --dtypes bfloat16 --bits 8 --storages int8,bf16-lean --period 200    # lean, with new bases

Every step writes the same random skew parameters for all weights and folds them. A float64 weight goes along, turned exactly.
README.md beside this file says what the columns mean.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import plot_spectrum
import torch
from rows import facts
from spectrum_rows import Row, write_csv
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.base import BASES
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import HALF, decode
from poetx_compile.retraction import retract_all

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Chain:
    """One weight on its way: the same start and the same rotations as all others, in a storage of its own."""

    dtype: str
    bits: int | None
    storage: str
    weight: nn.Parameter
    factor: OrthogonalFactor
    spectrum: Tensor

    @classmethod
    def start(
        cls, dtype: str, weight: Tensor, config: dict[str, int], bits: int | None = None, storage: str = "folded"
    ) -> Chain:
        parameter = nn.Parameter(weight.clone())
        settings = PoetxConfig(residual_bits=8 if bits is None else bits, **config)
        factor = OrthogonalFactor(parameter, "weight", settings, storage=storage)
        if storage != "folded":
            factor.base = BASES[storage](parameter, factor.stack)
            factor.base.write(weight)
        return cls(dtype, bits, storage, parameter, factor, torch.linalg.svdvals(weight.double()))

    @property
    def value(self) -> Tensor:
        """Float64 ``[m, n]``, residual included."""
        if self.factor.base is not None:
            return self.factor.made(torch.float64).weight()
        residual = self.factor.residual
        return decode(self.weight.detach(), residual if residual is None else residual.view(len(self.weight), -1)).double()

    def row(self, step: int, exact: Tensor) -> Row:
        value = self.value
        spectrum = torch.linalg.svdvals(value)
        moved = (spectrum - self.spectrum).abs()
        return Row(
            dtype=self.dtype,
            bits=self.bits,
            storage=self.storage,
            step=step,
            norm_drift=(spectrum.norm() / self.spectrum.norm() - 1).item(),
            spectrum_drift=(moved.max() / self.spectrum[0]).item(),
            spectrum_drift_rms=(moved.norm() / self.spectrum.norm()).item(),
            smallest=(spectrum[-1] / self.spectrum[0]).item(),
            distance=((value - exact).norm() / exact.norm()).item(),
        )


def drift(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Turn all weights together; yields their rows at each checkpoint."""
    generator = torch.Generator().manual_seed(args.seed)
    # bfloat16 numbers with few digits: every storage starts from the very same weight
    start = (torch.randn(args.shape, generator=generator) / math.sqrt(args.shape[1])).bfloat16().half().bfloat16()
    start = start.to(args.device)
    config = {"block_size": args.block, "seed": args.seed, "permutation_period": args.period}
    exact = Chain.start("float64", start.double(), config)
    chains = []
    for name in args.dtypes:
        weight, is_half = start.to(DTYPES[name]), DTYPES[name] in HALF
        chains += [Chain.start(name, weight, config, bits) for bits in (args.bits if is_half else [None])]
        chains += [Chain.start(name, weight, config, storage=storage) for storage in (args.storages if is_half else [])]
    size = skew_size(exact.factor, args.angle)
    for step in range(args.steps + 1):
        if step in args.at:
            yield [chain.row(step, exact.value) for chain in chains]
        q = torch.randn(exact.factor.q.shape, generator=generator).to(args.device) * size
        with torch.no_grad():
            for chain in (exact, *chains):
                chain.factor.q.copy_(q)
        retract_all((chain.factor, 1.0) for chain in (exact, *chains))
        for chain in (exact, *chains):
            chain.factor.count_step()


def skew_size(factor: OrthogonalFactor, angle: float) -> float:
    """Standard deviation of skew parameters that turn the channels by this angle, root mean square, to first order."""
    channels = sum(side.rotated for side in factor.stack.sides)
    return angle / 2 / math.sqrt(2 * factor.q.numel() / channels)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(256, 256), metavar="MxN")
    parser.add_argument("--block", type=int, default=256, help="channels that rotate together")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--angle", type=float, default=3e-3, help="radians that a channel turns in a step, root mean square")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES), metavar="NAME,...")
    parser.add_argument("--bits", type=lambda text: list(map(int, text.split(","))), default=[8, 4, 0], metavar="B,...")
    parser.add_argument(
        "--storages", type=lambda text: text.split(","), default=[], metavar="NAME,...", help="lean: int8, bf16-lean"
    )
    parser.add_argument(
        "--period", type=int, default=0, help="steps between new permutations, and so new bases of lean weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/spectrum-<device>.csv")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        parser.error(f"--dtypes takes {', '.join(DTYPES)}, not {unknown[0]}")
    if unknown := [name for name in args.storages if name not in BASES]:
        parser.error(f"--storages takes {', '.join(BASES)}, not {unknown[0]}")
    args.at = {round(args.steps ** (part / 24)) for part in range(25)} | {args.steps}
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    machine = facts(args.device) | {
        "shape": "x".join(map(str, args.shape)),
        "block": str(args.block),
        "angle": str(args.angle),
        "period": str(args.period),
        "seed": str(args.seed),
    }
    device = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower())
    out = args.out or RESULTS / f"spectrum-{device}.csv"
    rows: list[Row] = []
    for found in drift(args):
        rows += found
        write_csv(out, rows, machine)
    for row in found:
        print(f"{row.label:20} norm {row.norm_drift:+.1e}  spectrum {row.spectrum_drift:.1e}  distance {row.distance:.1e}")
    print(out, plot_spectrum.draw(out), sep="\n")


if __name__ == "__main__":
    main()
