"""Time and memory of a whole training step: poetx, other optimizers and adapters, and the authors' own code.

    python benchmarks/train_step.py --sizes 8b --methods poetx,adamw,official-fast --seq 2048 --official CHECKOUT
    python benchmarks/train_step.py --sizes 1b,3b --methods poetx,poetx:block_size=128 --batch max
    python benchmarks/train_step.py --sizes 8b --methods poetx:storage=int8:checkpointing=True,adamw --cap 24 --plan
    python benchmarks/train_step.py --sizes tiny --seq 64 --compiler aot_eager    # on a CPU, to check the script

Each method runs in a process of its own. README.md beside this file says how it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import plot_train
import torch
from llama import SIZES
from rows import Machine, append_csv
from train_methods import METHODS, Spec
from train_rows import Row
from train_run import Case
from train_table import markdown

RESULTS = Path(__file__).parent / "results"
CHILD = Path(__file__).with_name("train_run.py")
PLANNER = Path(__file__).with_name("train_plan.py")
MOST_DOUBLINGS = 12
LINES_TOLD = 20

Measured = tuple[Row, Machine]


@dataclass
class Launcher:
    """Starts a process for each case.

    Attributes:
        timeout: seconds that one case may take.
        deadline: of all cases, by ``time.monotonic``.
        has_cold_caches: whether each process starts with an empty folder of compiled code.
        machine: that the last process ran on.
    """

    timeout: float
    deadline: float
    has_cold_caches: bool = False
    machine: Machine = field(default_factory=dict)

    def __call__(self, case: Case) -> Measured:
        """What a case's process measured, or the row that says why it did not."""
        seconds = min(self.timeout, self.deadline - time.monotonic())
        if seconds <= 0:
            return replace(case.row(""), reason="left out: --minutes were used up before"), self.machine
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            out = Path(folder, "row.json")
            environment = dict(os.environ)
            if self.has_cold_caches:
                environment |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
            command = [sys.executable, str(CHILD), json.dumps(asdict(case)), str(out)]
            reason, lines = _run(command, environment, Path(folder, "log"), seconds)
            kept = json.loads(out.read_text()) if out.exists() else {"row": asdict(case.row("")), "machine": self.machine}
        row, self.machine = Row(**kept["row"]), kept["machine"]
        if not row.reason and not reason:
            return row, self.machine
        print(*lines[-LINES_TOLD:], sep="\n", file=sys.stderr)
        return replace(row, reason=row.reason or reason), self.machine

    def with_plan(self, row: Row, case: Case) -> Row:
        """The row of a case, with the estimate of its memory, made on CPU; or with a note why there is none."""
        seconds = min(self.timeout, self.deadline - time.monotonic())
        if seconds <= 0:
            return _noted(row, "not planned: --minutes were used up before")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "planned.json")
            command = [sys.executable, str(PLANNER), json.dumps(asdict(replace(case, batch=row.batch))), str(out)]
            reason, _ = _run(command, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, Path(folder, "log"), seconds)
            if reason:
                return _noted(row, f"not planned: {reason}")
            return replace(row, planned_bytes=json.loads(out.read_text()))


def _noted(row: Row, text: str) -> Row:
    return replace(row, note="; ".join(filter(None, (row.note, text))))


def _run(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> tuple[str, list[str]]:
    """Run to the end. Gives why that was not reached, or nothing, and the lines that the process wrote to stderr."""
    reason = ""
    with log.open("w") as file:  # a pipe would stay open for as long as workers that compile
        try:
            code = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=file, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code, reason = 0, f"not finished after {seconds:.3g} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code:
        reason = f"the process ended with {code}: {''.join(lines[-1:])[:300]}"
    return reason, lines


def largest_that_fits(measure: Callable[[Case], Measured], case: Case) -> Measured:
    """The case with the largest power of two as its batch, from ``case.batch`` on, that memory allows.

    Where not even that fits, smaller ones are tried, and the row of a batch of one says that it does not. A search that
    ends for another reason gives the largest batch that was measured, with that reason in its note.
    """
    row, machine = measure(case)
    while row.is_out_of_memory and case.batch > 1:
        case = replace(case, batch=case.batch // 2)
        row, machine = measure(case)
        if not row.reason:
            return replace(row, fits="max"), machine
    for _ in range(MOST_DOUBLINGS):
        if row.reason:
            break
        case = replace(case, batch=2 * case.batch)
        larger, larger_machine = measure(case)
        if larger.reason and not larger.is_out_of_memory:
            row = _noted(row, f"a batch of {case.batch} failed: {larger.reason}")
        if larger.reason:
            break
        row, machine = larger, larger_machine
    return replace(row, fits="max"), machine


def cases(args: argparse.Namespace) -> Iterator[tuple[Case, bool]]:
    """All cases, methods of a point side by side; with each, whether the batch is only where to begin."""
    points = itertools.product(args.sizes, args.seq, args.batch, args.micro, args.methods)
    for size, seq, (batch, is_searched), micro, method in points:
        case = Case(
            size=size,
            method=method,
            seq=seq,
            batch=batch,
            micro=micro,
            layers=args.layers,
            steps=args.steps,
            warmup=args.warmup,
            device=args.device,
            compiler=args.compiler,
            official=None if args.official is None else str(args.official.resolve()),
            cap_bytes=None if args.cap is None else round(1e9 * args.cap),
            caches="cold" if args.cold else "shared",
            peak_flops=args.peak_flops,
            peak_bandwidth=args.peak_bandwidth,
        )
        yield case, is_searched


def told(row: Row) -> str:
    """One line about a row."""
    depth = f" ({row.layers} layers)" if row.is_cut else ""
    head = f"{row.size}{depth}, {row.label}, {row.batch} x {row.seq} tokens, {row.micro} micro-batches: "
    planned = f", planned {row.planned_bytes / 1e9:.1f} GB" if row.planned_bytes else ""
    if row.step_ms is None:
        return head + row.reason + planned
    memory = (f", peak {row.peak_bytes / 1e9:.1f} GB" if row.peak_bytes else "") + planned
    floor = f", {row.gap:.2f} x floor" if row.gap else ""
    return (
        f"{head}{row.step_ms:.1f} ms, {row.tokens_per_s:,.0f} tokens/s{memory}{floor}, first step {row.first_step_s:.0f} s"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=_words, default=["1b", "3b", "8b", "13b"], metavar="SIZE,...", help=", ".join(SIZES))
    add("--methods", type=_words, default=["poetx", "adamw"], metavar="METHOD,...", help=", ".join(METHODS))
    add("--seq", type=_numbers, default=[2048], metavar="N,...", help="tokens of a sequence (default: 2048)")
    add(
        "--batch",
        type=_batches,
        default=[(1, False)],
        metavar="N|max|max:N,...",
        help="sequences; max: what fits, from N on",
    )
    add("--micro", type=_numbers, default=[1], metavar="N,...", help="micro-batches of a step (default: 1)")
    add("--layers", type=_positive, help="cut the models to this depth, as the rows then say")
    add("--steps", type=_positive, default=12, help="that are timed (default: 12)")
    add("--warmup", type=_positive, default=3, help="steps before, beside the first (default: 3)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compiler", choices=("inductor", "aot_eager"), default="inductor", help="aot_eager: for debugging")
    add("--official", type=Path, metavar="DIR", help="the folder that holds poet_torch")
    add("--cap", type=_gigabytes, metavar="GB", help="10^9 bytes that PyTorch's allocator may hold at most, on CUDA")
    add("--plan", action="store_true", help="estimate the memory of poetx and adamw too, on CPU")
    add("--cold", action="store_true", help="an empty cache of compiled code for each process, to compare first steps")
    add("--timeout", type=float, default=420.0, help="seconds that one process may take (default: 420)")
    add("--minutes", type=float, default=float("inf"), help="after which what is left is left out")
    add("--peak-flops", type=float, help="bfloat16 flop/s, for the floors; default: by device")
    add("--peak-bandwidth", type=float, help="bytes/s, for the floors; default: by device")
    add("--out", type=Path, help="rows are added to it; default: benchmarks/results/train-step-<device>.csv")
    args = parser.parse_args(argv)
    if unknown := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if args.cap is not None and torch.device(args.device).type != "cuda":
        parser.error(f"--cap bounds the allocator of CUDA devices, and --device is {args.device}: leave --cap out")
    try:
        for method in args.methods:
            Spec.parse(method)
    except ValueError as error:
        parser.error(str(error))
    return args


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _gigabytes(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def _batches(text: str) -> list[tuple[int, bool]]:
    """Batches, and whether each is only where the search for the largest begins."""
    parts = [part.partition("max") for part in text.split(",")]
    return [
        (_positive(after.lstrip(":") or "1"), True) if found else (_positive(before), False)
        for before, found, after in parts
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    measure = Launcher(args.timeout, time.monotonic() + 60 * args.minutes, args.cold)
    out: Path | None = args.out
    rows = []
    for case, is_searched in cases(args):
        row, machine = largest_that_fits(measure, case) if is_searched else measure(case)
        if args.plan:
            row = measure.with_plan(row, case)
        print(told(row), flush=True)
        name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("device") or "unknown").lower())
        out = out or RESULTS / f"train-step-{name}.csv"
        append_csv(out, row, machine)
        rows.append(row)
    print()
    print(markdown(rows))
    print(*([out, *plot_train.draw(out)] if out else []), sep="\n")


if __name__ == "__main__":
    main()
