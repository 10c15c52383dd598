"""Real models trained for a few steps by rotations: what is converted, and whether all that must hold does.

    python benchmarks/models.py --jobs 4 --check       # on a GPU: every model at the size that its authors published
    python benchmarks/models.py --only "Llama*" BERT*  # some of them
    python benchmarks/models.py --size tiny --dtype float32    # anywhere: the script itself

README.md beside this file says what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from model_sizes import MODELS, TINY_OPTIONS, Batch, Model
from rich.console import Console
from rich.table import Table
from rows import facts, write_csv
from timing import one_line
from torch import Tensor, nn

import poetx_compile
from poetx_compile.backend import poetx
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels.residual import decode
from poetx_compile.registry import factors

RESULTS = Path(__file__).parent / "results"
LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
SPECTRUM_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-4}
WEIGHTS_LOOKED_AT = 3
ALONE = "torch.compile alone raises this too: "
MISSING = "not installed: "


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        note: what was left out of the published size.
        parameters: numbers in the model.
        coverage: per cent of them that are rotated.
        dtype: of weights and activations.
        first_loss, last_loss: of the first and of the last step, on the same batch.
        compiled_loss, raw_loss: after the last step, of the compiled module and of the module as it was written.
        ordinary_loss: of the module under ``torch.compile`` without this backend, asked for where the two differ.
        spectrum_error: how far the singular values of three rotated weights moved, over the largest; the worst of them.
        least_change: how far those weights moved, ``‖W − W₀‖ / ‖W₀‖``; the least of them.
        peak_gb: the most that tensors took on the GPU after the first step, 10⁹ bytes.
        first_step_s: seconds of the first step, compilation among them.
        step_ms: median of the later steps, while other models ran beside it.
        reason: what does not hold; empty where all does.
    """

    model: str
    note: str
    parameters: int | None = None
    coverage: float | None = None
    dtype: str
    steps: int
    first_loss: float | None = None
    last_loss: float | None = None
    compiled_loss: float | None = None
    raw_loss: float | None = None
    ordinary_loss: float | None = None
    spectrum_error: float | None = None
    least_change: float | None = None
    peak_gb: float | None = None
    first_step_s: float | None = None
    step_ms: float | None = None
    reason: str = ""

    @property
    def is_failed(self) -> bool:
        return bool(self.reason) and not self.reason.startswith((MISSING, ALONE))


class Watched:
    """A rotated weight, to whose start its present is compared. With all its digits, those of the residual among them."""

    def __init__(self, weight: nn.Parameter, factor: OrthogonalFactor) -> None:
        self._weight, self._factor = weight, factor
        self._start = self._matrix()

    def change(self) -> float:
        return float((self._matrix() - self._start).norm() / self._start.norm())

    def spectrum_error(self) -> float:
        before, now = _spectrum(self._start), _spectrum(self._matrix())
        return float((now - before).abs().max() / before.max())

    def _matrix(self) -> Tensor:
        """The first matrix of the stack that the weight is."""
        return decode(self._weight.detach(), self._factor.residual).reshape(self._factor.stack.shape)[0]


def _spectrum(matrix: Tensor) -> Tensor:
    """Singular values, ascending: by the eigenvalues of the smaller Gram matrix in float64, far faster than an SVD on a GPU."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0).sqrt()


def train(model: Model, args: argparse.Namespace) -> Row:
    """Some steps on one batch, and what is true after them."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    module, batch = model.build(args.size, dtype, device)
    options = model.options | (TINY_OPTIONS if args.size == "tiny" else {})
    compiled = torch.compile(module, backend=poetx, options=options)
    optimizer = torch.optim.AdamW(module.parameters(), args.lr)
    losses, seconds, watched = [], [], []
    for step in range(args.steps):
        started = time.perf_counter()
        loss = model.loss(compiled(**batch), batch)
        loss.backward()
        if step == 0:
            watched = _watch(module)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        _wait(device)
        seconds.append(time.perf_counter() - started)
        if step == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    report = poetx_compile.report(module, show=False)
    row = Row(
        model=model.name,
        note=model.note,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        coverage=round(100 * report.coverage, 1),
        dtype=args.dtype,
        steps=args.steps,
        first_loss=losses[0],
        last_loss=losses[-1],
        compiled_loss=model.loss(compiled(**batch), batch).item(),
        raw_loss=_raw_loss(model, module, batch),
        spectrum_error=max((weight.spectrum_error() for weight in watched), default=None),
        least_change=min((weight.change() for weight in watched), default=None),
        peak_gb=peak,
        first_step_s=seconds[0],
        step_ms=1000 * statistics.median(seconds[1:]),
    )
    if not agree(row.raw_loss, row.compiled_loss, dtype):
        ordinary = torch.compile(module, backend=options.get("inner", "inductor"))
        row = dataclasses.replace(row, ordinary_loss=model.loss(ordinary(**batch), batch).item())
    return dataclasses.replace(row, reason="; ".join(broken(row)))


def agree(one: float, other: float, dtype: torch.dtype) -> bool:
    return abs(one - other) <= LOSS_ERROR[dtype] * max(1, abs(one))


def _watch(module: nn.Module) -> list[Watched]:
    """The first, the middle and the last rotated weight."""
    rotated = [(weight, factor) for weight in module.parameters() if (factor := factors.of_weight(weight)) is not None]
    places = {round(part * (len(rotated) - 1) / (WEIGHTS_LOOKED_AT - 1)) for part in range(WEIGHTS_LOOKED_AT)}
    return [Watched(*rotated[place]) for place in sorted(places)] if rotated else []


@torch.no_grad()
def _raw_loss(model: Model, module: nn.Module, batch: Batch) -> float:
    return model.loss(module(**batch), batch).item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def broken(row: Row) -> list[str]:
    """What should hold of a trained model, and does not."""
    dtype = getattr(torch, row.dtype)
    if not row.coverage:
        return ["nothing was rotated"]
    found = [
        (row.last_loss < row.first_loss, "the loss did not fall"),
        (row.least_change > 0, "a weight did not move"),
        (row.spectrum_error <= SPECTRUM_ERROR[dtype], f"singular values moved by {row.spectrum_error:.1e}"),
        (
            agree(row.raw_loss if row.ordinary_loss is None else row.ordinary_loss, row.compiled_loss, dtype),
            f"raw loss {row.raw_loss:.5g}, compiled {row.compiled_loss:.5g}"
            + ("" if row.ordinary_loss is None else f", by torch.compile alone {row.ordinary_loss:.5g}"),
        ),
    ]
    return [reason for holds, reason in found if not holds]  # a comparison with NaN does not hold


def one(name: str, args: argparse.Namespace) -> Row:
    """In the model's own process: its row, whatever happens."""
    try:
        return train(MODELS[name], args)
    except ModuleNotFoundError as error:
        if error.name and error.name == MODELS[name].library:
            return failed(name, args, MISSING + error.name)
        reason = one_line(error)
    except Exception as error:
        traceback.print_exc()
        reason = one_line(error)
        if fails_alone(MODELS[name], args, type(error)):
            reason = ALONE + reason
    return failed(name, args, reason)


def fails_alone(model: Model, args: argparse.Namespace, kind: type[Exception]) -> bool:
    """Whether ``torch.compile`` raises the same kind of error without this backend."""
    torch.compiler.reset()
    module, batch = model.build(args.size, getattr(torch, args.dtype), torch.device(args.device))
    try:
        model.loss(torch.compile(module)(**batch), batch).backward()
    except kind:
        return True
    except Exception:
        return False
    return False


def failed(name: str, args: argparse.Namespace, reason: str) -> Row:
    return Row(model=name, note=MODELS[name].note, dtype=args.dtype, steps=args.steps, reason=reason)


def in_a_process(name: str, args: argparse.Namespace) -> Row:
    """A process of its own, so that memory, compiled code and crashes are its own as well."""
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    limits = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    environment = os.environ | limits | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "row.json"), Path(folder, "log")
        same = [f"--{key}={getattr(args, key)}" for key in ("size", "dtype", "device", "steps", "lr")]
        command = [sys.executable, __file__, "--one", name, "--answer", str(answer), *same]
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                process.wait(args.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return failed(name, args, f"no result after {args.seconds} s")
        if answer.exists():
            row = Row(**json.loads(answer.read_text()))
            if row.is_failed:
                print(log.read_text()[-3000:], file=sys.stderr)
            return row
        lines = log.read_text().strip().splitlines() or [""]
        return failed(name, args, f"the process ended with {process.returncode}: {lines[-1][:200]}")


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="models", title_justify="left")
    for name in (
        "model",
        "parameters",
        "rotated",
        "loss",
        "raw = compiled",
        "spectrum",
        "GB",
        "first s",
        "step ms",
        "reason",
    ):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [row.model + (f" ({row.note})" if row.note else "")]
        if row.parameters is None:
            cells += [""] * 8
        else:
            cells += [f"{row.parameters / 1e6:,.0f} M", f"{row.coverage} %", f"{row.first_loss:.3f} to {row.last_loss:.3f}"]
            cells += [f"{row.raw_loss:.4f} {row.compiled_loss:.4f}", _number(row.spectrum_error, ".1e")]
            cells += [_number(row.peak_gb, ".1f"), _number(row.first_step_s, ".0f"), _number(row.step_ms, ".0f")]
        table.add_row(*cells, row.reason)
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of models; * stands for anything")
    add("--size", choices=("real", "tiny"), default="real")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--steps", type=int, default=6, help="at least 2")
    add("--lr", type=float, default=1e-3, help="of AdamW")
    add("--jobs", type=int, default=4, help="models at once")
    add("--seconds", type=float, default=400, help="that one model may take")
    add("--check", action="store_true", help="exit with an error if anything does not hold")
    add("--out", type=Path, help="default: benchmarks/results/models-<device>.csv")
    add("--one", choices=MODELS, help=argparse.SUPPRESS)
    add("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be 2 or more: the first one compiles")
    args.names = [name for name in MODELS if any(fnmatchcase(name, pattern) for pattern in args.only)]
    if not args.names:
        parser.error(f"--only {' '.join(args.only)} names no model; there are {', '.join(MODELS)}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse(argv)
    if args.one:
        warnings.filterwarnings("ignore", category=FutureWarning)
        args.answer.write_text(json.dumps(dataclasses.asdict(one(args.one, args))))
        return []
    machine: dict[str, Any] = facts(torch.device(args.device), "timm", "torchvision")
    out = args.out or RESULTS / f"models-{re.sub(r'[^a-z0-9]+', '-', str(machine['device']).lower())}.csv"
    done: dict[str, Row] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(in_a_process, name, args) for name in args.names]
        for future in as_completed(waiting):
            row = future.result()
            done[row.model] = row
            print(f"{len(done)}/{len(args.names)} {row.model}: {row.reason or 'holds'}", flush=True)
            rows = [done[name] for name in args.names if name in done]
            write_csv(out, rows, machine | {"size": args.size, "jobs": str(args.jobs)})
    show(rows, Console(width=None if sys.stdout.isatty() else 200))
    print(out)
    if args.check and (wrong := [row.model for row in rows if row.is_failed]):
        raise SystemExit(f"{', '.join(wrong)}: column 'reason' of {out} says why")
    return rows


if __name__ == "__main__":
    main()
