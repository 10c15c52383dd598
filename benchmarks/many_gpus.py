"""What several GPUs would send, hold and take by the formulas of docs/distributed.md: a plan on paper, not a measurement.

python benchmarks/many_gpus.py                          # writes benchmarks/results/many_gpus.csv
python benchmarks/many_gpus.py --models 3b --ranks 2 --flops 989e12 --bandwidth 300e9
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from poetx_compile.config import PoetxConfig
from poetx_compile.layout import StackLayout

WEIGHT, RESIDUAL, SKEW, MOMENTS = 2, 1, 4, 2
"""Bytes of a bfloat16 weight or gradient, of its residual, of a number of ``q``; AdamW's moments for each trained number."""


@dataclass(frozen=True)
class Llama:
    hidden: int
    ffn: int
    layers: int
    vocabulary: int
    kv: int
    """Channels of keys, and of values."""

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """``[m, n]`` of the linear layers of one decoder layer."""
        h, f = self.hidden, self.ffn
        return [(h, h), (self.kv, h), (self.kv, h), (h, h), (f, h), (f, h), (h, f)]

    @property
    def converted(self) -> int:
        return self.layers * sum(m * n for m, n in self.matrices)

    @property
    def ordinary(self) -> int:
        """Embedding, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def skews(self, block: int) -> tuple[int, int]:
        """Numbers of ``q`` on the side of the rows, and of the columns."""
        chunk = PoetxConfig(block_size=block).chunk
        stacks = [StackLayout.of((1, m, n), block, chunk) for m, n in self.matrices]
        return self.layers * sum(stack.rows.skew for stack in stacks), self.layers * sum(
            stack.columns.skew for stack in stacks
        )

    def flops(self, tokens: int, block: int | None) -> float:
        """Of the products of one step, without attention's own; ``block`` is None for ordinary training."""
        head = 6 * tokens * self.vocabulary * self.hidden
        if block is None:
            return 6 * tokens * self.converted + head
        gram = 2 * tokens * self.layers * sum(block * (m + n) for m, n in self.matrices)
        fold = 4 * self.converted * block
        return 4 * tokens * self.converted + gram + fold + head


MODELS = {
    "tiny": Llama(64, 128, 2, 128, 64),
    "1b": Llama(2048, 5632, 24, 32000, 2048),
    "3b": Llama(2560, 7168, 32, 32000, 2560),
    "8b": Llama(4096, 14336, 32, 128256, 1024),
    "70b": Llama(8192, 28672, 80, 128256, 1024),
}

PLANS = ("adamw ddp", "poetx ddp", "poetx ddp bf16", "adamw fsdp2", "poetx row blocks")


@dataclass(frozen=True)
class Line:
    """One plan for one model and number of ranks.

    Attributes:
        sent_bytes: by one rank in a step, in a ring.
        state_bytes: weights, residuals, gradients and moments on one rank; activations come on top.
        communication_s, compute_s: seconds of a step, each alone; computation is that of the products at the given rate.
        step_s: with communication behind the backward pass as far as it goes.
        efficiency: time of a step without communication over ``step_s``.
    """

    model: str
    plan: str
    ranks: int
    tokens: int
    block: int
    flops_per_s: float
    bytes_per_s: float
    latency_s: float
    sent_bytes: float
    state_bytes: float
    communication_s: float
    compute_s: float
    step_s: float
    efficiency: float


def evaluate(name: str, plan: str, ranks: int, args: argparse.Namespace) -> Line:
    model = MODELS[name]
    rows, columns = model.skews(args.block)
    sent, state = _bytes(model, plan, ranks, rows, columns)
    is_sharded = plan in ("adamw fsdp2", "poetx row blocks")
    calls = 3 * model.layers if is_sharded else math.ceil(sent / (2 * 25 * 2**20))
    communication = sent / args.bandwidth + 2 * math.log2(ranks) * args.latency * calls if ranks > 1 else 0.0
    compute = model.flops(args.tokens, args.block if plan.startswith("poetx") else None) / args.flops
    hidden = compute * (1 if is_sharded else 2 / 3)  # gathers also run behind the forward pass
    step = compute + max(0.0, communication - hidden)
    given = (args.tokens, args.block, args.flops, args.bandwidth, args.latency)
    return Line(name, plan, ranks, *given, sent, state, communication, compute, step, compute / step)


def _bytes(model: Llama, plan: str, ranks: int, rows: int, columns: int) -> tuple[float, float]:
    """What one rank sends, and holds."""
    converted, ordinary, skews = model.converted, model.ordinary, rows + columns
    share = (ranks - 1) / ranks
    trained = WEIGHT * (2 + MOMENTS)  # of an ordinary weight: itself, its gradient, its moments
    rotated = (WEIGHT + RESIDUAL) * converted + SKEW * (2 + MOMENTS) * skews
    if plan == "adamw ddp":
        return 2 * share * WEIGHT * (converted + ordinary), trained * (converted + ordinary)
    if plan == "adamw fsdp2":
        norms = 2 * model.layers * model.hidden  # gathered with their layer
        return share * WEIGHT * (3 * converted + 2 * ordinary + norms), trained * (converted + ordinary) / ranks
    if plan == "poetx row blocks":
        sent = 2 * WEIGHT * converted + SKEW * (rows + 2 * columns) + 2 * WEIGHT * ordinary
        held = (WEIGHT + RESIDUAL) * converted + SKEW * (2 + MOMENTS) * rows + trained * ordinary
        return share * sent, held / ranks + SKEW * (2 + MOMENTS) * columns
    width = WEIGHT if plan.endswith("bf16") else SKEW
    return 2 * share * (width * skews + WEIGHT * ordinary), rotated + trained * ordinary


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["1b", "3b", "8b", "70b"])
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[2, 8, 64, 1024, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank in a step")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--flops", type=float, default=400e12, help="flop/s that products reach on one GPU: an assumption")
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes/s that one rank sends: an assumption")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of one hop: an assumption")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "many_gpus.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    lines = [evaluate(model, plan, ranks, args) for model in args.models for ranks in args.ranks for plan in PLANS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Line))
        writer.writerows(asdict(line).values() for line in lines)
    print(f"{'model':6} {'plan':17} {'ranks':>6} {'sent GB':>8} {'state GB':>9} {'step s':>7} {'efficiency':>10}")
    for line in lines:
        numbers = f"{line.sent_bytes / 1e9:8.2f} {line.state_bytes / 1e9:9.1f} {line.step_s:7.3f} {line.efficiency:10.3f}"
        print(f"{line.model:6} {line.plan:17} {line.ranks:6} {numbers}")


if __name__ == "__main__":
    main()
