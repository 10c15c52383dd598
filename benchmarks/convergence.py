"""Loss against tokens of small Llamas, by recipe: rotations, AdamW, Muon, SGD and the authors' code, on the same batches.

    python benchmarks/convergence.py --corpus DIR --suite core --jobs 3 --minutes 9    # again until nothing is left
    python benchmarks/convergence.py --corpus DIR --runs poetx,adamw:dtype=autocast --grid lr=1e-3,2e-3,4e-3
    python benchmarks/convergence.py --corpus DIR --size 350m --runs poetx --steps 4883 --minutes 60
    python benchmarks/convergence.py --corpus DIR --size tiny --runs poetx --device cpu --compiler aot_eager    # a check

The corpus is a folder with train.bin, val.bin and meta.json. Whatever is finished in the CSV is not run again; what was
stopped goes on from its checkpoint. README.md beside this file says how it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import convergence_run
import plot_convergence
import torch
from convergence_recipes import SIZES, Recipe
from convergence_rows import Key, by_run, merged, read_csv, write_csv
from convergence_run import Case
from convergence_suites import SUITES
from convergence_table import markdown, write_all

RESULTS = Path(__file__).parent / "results"
CHILD = Path(__file__).with_name("convergence_run.py")
POLL_SECONDS = 1.0
START_SECONDS = 45.0
LINES_TOLD = 20


class Board:
    """The results so far: what stood in the CSV, and what the runs wrote since."""

    def __init__(self, out: Path, cases: Sequence[Case]) -> None:
        self.out, self.cases = out, cases
        self.lines = read_csv(out)
        self._seen: dict[Path, float] = {}

    def update(self) -> None:
        """Write the CSV anew where a run has written something."""
        for case in self.cases:
            path = case.lines_path
            written = path.stat().st_mtime if path.exists() else None
            if written is not None and self._seen.get(path) != written:
                self._seen[path] = written
                self.lines = merged(self.lines, case.lines())
                write_csv(self.out, self.lines)

    def end(self, key: Key) -> str:
        """How a run ended; nothing if it has not."""
        found = by_run(self.lines).get(key)
        return found[-1].row.end if found else ""

    def told(self, key: Key) -> str:
        found = by_run(self.lines).get(key)
        if not found:
            return f"{key.label}: not begun"
        last = found[-1].row
        losses = [line.row.val_loss for line in found if line.row.val_loss is not None]
        loss = f"validation {losses[-1]:.4f}" if losses else f"training {last.train_loss:.4f}"
        how = last.end or f"stopped at step {last.step}"
        return f"{key.label}: {how}, {loss}, {last.seconds:.0f} s, {last.tokens_per_s:,.0f} tokens/s"


def run_here(cases: Sequence[Case], board: Board) -> bool:
    """One run after another in this process; says whether all went well."""
    for case in cases:
        if time.time() + START_SECONDS > case.deadline:
            break
        torch._dynamo.reset()
        convergence_run.Run(case).train()
        board.update()
        print(board.told(case.key), flush=True)
    return True


def run_beside(cases: Sequence[Case], board: Board, jobs: int) -> bool:
    """Processes side by side; says whether all went well."""
    waiting = list(cases)
    running: dict[subprocess.Popen[bytes], tuple[Case, Path]] = {}
    is_well = True
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.time() + START_SECONDS < waiting[0].deadline:
                process, case, log = _start(waiting.pop(0))
                running[process] = case, log
            if not running:
                break
            time.sleep(POLL_SECONDS)
            board.update()
            for process in [process for process in running if process.poll() is not None]:
                case, log = running.pop(process)
                print(board.told(case.key), flush=True)
                if process.returncode:
                    is_well = False
                    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    print(f"the process ended with {process.returncode}:", *lines[-LINES_TOLD:], sep="\n  ", flush=True)
    finally:
        for process in running:
            process.terminate()
    return is_well


def _start(case: Case) -> tuple[subprocess.Popen[bytes], Case, Path]:
    log = case.lines_path.with_suffix(".log")
    with log.open("w") as file:
        command = [sys.executable, str(CHILD), case.text()]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file), case, log


def keys(args: argparse.Namespace) -> Iterator[Key]:
    """All runs that were asked for, each once: a suite's in its order, and every seed of a run before the next run."""
    specs = [spec for name in args.suite for spec in SUITES[name].recipes] + args.runs
    grids = [[(name, value) for value in values] for name, values in args.grid]
    seen = set()
    for spec, point in itertools.product(specs, itertools.product(*grids)):
        recipe = Recipe.parse(":".join([spec, *(f"{name}={value}" for name, value in point)]))
        for seed in args.seeds:
            key = Key(size=args.size, recipe=str(recipe), seed=seed, steps=args.steps, batch=args.batch, seq=args.seq)
            if key not in seen:
                seen.add(key)
                yield key


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with train.bin, val.bin and meta.json")
    add("--size", choices=SIZES, default="60m")
    add("--suite", type=_words, default=[], metavar="NAME,...", help=f"questions: {', '.join(SUITES)}")
    add("--runs", type=_words, default=[], metavar="METHOD:OPTION=VALUE:...,...", help="recipes")
    add("--grid", type=_grid, action="append", default=[], metavar="OPTION=V,V", help="each run with each value; repeatable")
    add("--seeds", type=_numbers, default=[0], metavar="N,...", help="of initial weights and batches (default: 0)")
    add("--steps", type=_positive, default=800)
    add("--batch", type=_positive, default=128, help="windows a step")
    add("--seq", type=_positive, default=256, help="tokens a window")
    add("--jobs", type=int, default=1, help="processes side by side; 0 runs all in this process, for debugging")
    add("--minutes", type=float, default=24 * 60, help="stop with checkpoints after so long; a later call goes on")
    add("--log-every", type=_positive, default=20, help="steps between lines")
    add("--eval-every", type=_positive, default=100, help="steps between validations")
    add("--eval-batch", type=_positive, default=32, help="windows of a validation batch")
    add("--official", type=Path, help="a checkout of github.com/Sphere-AI-Lab/poet")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compiler", choices=("inductor", "aot_eager"), default="inductor", help="aot_eager for debugging")
    add("--out", type=Path, help="CSV (default: benchmarks/results/convergence-<device>.csv)")
    add("--state", type=Path, default=Path("runs/convergence"), help="folder of checkpoints (default: runs/convergence)")
    add("--document", type=Path, help="write the tables of all questions into this file, between their markers")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.suite if name not in SUITES]:
        parser.error(f"--suite takes {', '.join(SUITES)}, not {unknown[0]}")
    if not args.suite and not args.runs:
        parser.error("nothing to run: give --suite or --runs")
    args.deadline = time.time() + 60 * args.minutes
    try:
        args.keys = list(keys(args))
    except ValueError as error:
        parser.error(str(error))
    return args


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _grid(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no option=value,value")
    return name, values.split(",")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{args.device}"
    out = args.out or RESULTS / f"convergence-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.csv"
    args.state.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(
            key=key,
            corpus=str(args.corpus),
            state=str(args.state),
            device=args.device,
            deadline=args.deadline,
            jobs=max(args.jobs, 1),
            log_every=args.log_every,
            eval_every=args.eval_every,
            eval_batch=args.eval_batch,
            compiler=args.compiler,
            official=None if args.official is None else str(args.official),
        )
        for key in args.keys
    ]
    board = Board(out, cases)
    board.update()
    left = [case for case in cases if not board.end(case.key)]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the runs end with this process
    is_well = run_beside(left, board, args.jobs) if args.jobs else run_here(left, board)
    remaining = [key for key in args.keys if not board.end(key)]
    print(f"\n{len(args.keys) - len(remaining)} of {len(args.keys)} runs have ended", *map(board.told, remaining), sep="\n")
    mine = [line for line in board.lines if line.key in set(args.keys)]
    if mine:
        print(markdown(mine), out, *plot_convergence.draw(out), sep="\n")
    if args.document is not None:
        write_all(args.document, board.lines)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
