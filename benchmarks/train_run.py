"""One method at one point of the whole-model benchmark, in the process that this is: ``train_step.py`` starts it."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import floors
import llama
import torch
from clocks import Clock, EventClock, WallClock
from llama import SIZES
from memory import account, hold_below
from model_floors import Load
from official import RefusalError
from rows import facts
from timing import Timing, one_line
from torch import Tensor
from train_methods import Spec, Trainer
from train_rows import Row

from poetx_compile.registry import factors

RARE_TIMES = 3


@dataclass(frozen=True)
class Case:
    """What one process measures; ``layers`` None is all of the model's, ``cap_bytes`` None all of the card's memory."""

    size: str
    method: str
    seq: int
    batch: int
    micro: int
    layers: int | None = None
    steps: int = 12
    warmup: int = 3
    device: str = "cuda"
    compiler: str = "inductor"
    official: str | None = None
    cap_bytes: int | None = None
    caches: str = "shared"
    peak_flops: float | None = None
    peak_bandwidth: float | None = None

    @property
    def shape(self) -> llama.Size:
        size = SIZES[self.size]
        return replace(size, layers=self.layers or size.layers)

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.method, self.compiler, None if self.official is None else Path(self.official))

    @property
    def load(self) -> Load:
        return Load(self.shape, self.batch, self.seq, self.micro)

    def row(self, device_name: str) -> Row:
        """All that is known before anything is measured."""
        least = self.spec.floor(self.load)
        return Row(
            size=self.size,
            layers=self.shape.layers,
            is_cut=int(self.shape.layers < SIZES[self.size].layers),
            method=self.method,
            compiler=self.compiler,
            seq=self.seq,
            batch=self.batch,
            micro=self.micro,
            cap_bytes=self.cap_bytes,
            caches=self.caches,
            flops=least.flops,
            bytes=least.bytes,
            **least.ms(floors.peaks(device_name, self.peak_flops, self.peak_bandwidth)),
        )


class Run:
    """A trainer on its device, and random tokens for it: ``[micro, batch, seq]``."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.device = torch.device(case.device)
        if case.cap_bytes is not None:
            hold_below(case.cap_bytes, self.device)
        self.clock: Clock = EventClock() if self.device.type == "cuda" else WallClock()
        model = llama.build(case.shape, case.seq, self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trainer: Trainer = case.spec.trainer(model, case.shape)
        shape = (case.micro, case.batch, case.seq)
        self.ids = torch.randint(case.shape.vocabulary, shape, device=self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def backward(self) -> Tensor:
        """Forward and backward of all micro-batches; gives the last loss."""
        for ids in self.ids:
            loss = self.trainer.loss(ids)
            (loss / self.case.micro).backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.trainer.update()
        return loss

    def measure(self, row: Row) -> Row:
        """Take all steps that there are to take.

        Raises:
            RuntimeError: the loss is not finite.
        """
        clock, case = self.clock, self.case
        started = time.perf_counter()
        self.backward()
        before = clock.now()
        self.trainer.update()
        after = clock.now()
        self.wait()
        first_step_s = time.perf_counter() - started
        first_update_ms = clock.ms(before, after)

        for _ in range(case.warmup):
            self.step()
        self.wait()
        self.forget_peak()
        moments = [clock.now()]
        for _ in range(case.steps):
            loss = self.step()
            moments.append(clock.now())
        self.wait()
        timing = Timing.of([clock.ms(*pair) for pair in pairwise(moments)])
        memory = self.memory()
        if not loss.isfinite():
            raise RuntimeError(f"the loss became {float(loss)}")

        parts = self.parts()
        rare_ms, share = self.rare(first_update_ms, parts["optimizer_ms"])
        parts["optimizer_ms"] += share
        if self.trainer.rare is not None and self.trainer.rare.run is not None:
            parts["retraction_ms"] = parts.get("retraction_ms", 0.0) + share
        step_ms = timing.median + share
        tokens = case.micro * case.batch * case.seq
        rare = self.trainer.rare
        return replace(
            row,
            step_ms=step_ms,
            step_ms_q20=timing.q20 + share,
            step_ms_q80=timing.q80 + share,
            tokens_per_s=1e3 * tokens / step_ms,
            **parts,
            rare_ms=rare_ms,
            rare_period=rare.period if rare else None,
            timed_by=clock.timed_by,
            steps=case.steps,
            first_step_s=first_step_s,
            **memory,
            parameters=self.parameters,
            trained=self.trained(),
            gap=step_ms / row.floor_ms if row.floor_ms else None,
            loss=float(loss),
            note=self.note(rare_ms),
        )

    def trained(self) -> int:
        """Numbers that optimizers train: of a rotated weight, those of its rotation."""
        groups = (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        pairs = [(weight, factors.of_weight(weight)) for group in groups for weight in group["params"]]
        return sum(weight.numel() if factor is None else factor.q.numel() for weight, factor in pairs)

    def parts(self) -> dict[str, float]:
        """Medians of a step's parts in milliseconds, from steps of their own."""
        samples = [self.marked_step() for _ in range(max(3, self.case.steps // 2))]
        self.wait()
        timed = [sample() for sample in samples]
        return {name: median(sample[name] for sample in timed) for name in timed[0]}

    def marked_step(self) -> Callable[[], dict[str, float]]:
        """A step with its moments noted; gives what reads them once the device is idle."""
        clock, trainer = self.clock, self.trainer
        passes = []
        for ids in self.ids:
            start = clock.now()
            loss = trainer.loss(ids)
            middle = clock.now()
            (loss / self.case.micro).backward()
            passes.append((start, middle, clock.now()))
        folds = []
        if trainer.folding is not None:
            trainer.folding.mark = lambda: folds.append(clock.now())
        trainer.update()
        end = clock.now()
        if trainer.folding is not None:
            trainer.folding.mark = None

        def read() -> dict[str, float]:
            parts = {
                "forward_ms": sum(clock.ms(start, middle) for start, middle, _ in passes),
                "backward_ms": sum(clock.ms(middle, stop) for _, middle, stop in passes),
                "optimizer_ms": clock.ms(passes[-1][-1], end),
            }
            if folds:
                parts["retraction_ms"] = clock.ms(folds[-1], end)
            return parts

        return read

    def rare(self, first_update_ms: float, update_ms: float) -> tuple[float | None, float]:
        """Milliseconds of the work that is not done at every step, and its share in one."""
        rare = self.trainer.rare
        if rare is None:
            return None, 0.0
        if rare.run is None:
            taken = max(0.0, first_update_ms - update_ms)
        else:
            rare.run()
            moments = [self.clock.now()]
            for _ in range(RARE_TIMES):
                rare.run()
                moments.append(self.clock.now())
            self.wait()
            taken = median(self.clock.ms(*pair) for pair in pairwise(moments))
        return taken, taken / rare.period

    def note(self, rare_ms: float | None) -> str:
        notes = [self.trainer.note] if self.trainer.note else []
        if rare := self.trainer.rare:
            notes.append(f"step and optimizer with 1/{rare.period} of the {rare.what}, {rare_ms:.1f} ms each time")
        return "; ".join(notes)

    def forget_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> Mapping[str, int | None]:
        """The peak since it was forgotten, and what it is made of; a step more, for the gradients."""
        peak = reserved = None
        if self.device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.backward()
        parts = account(self.trainer.module, self.trainer.optimizers, self.device)
        self.trainer.update()
        rest = None if peak is None else peak - sum(parts.values())
        return {"peak_bytes": peak, "reserved_bytes": reserved, **parts, "rest_bytes": rest}


def main(case_text: str, out: str) -> None:
    """Measure, and keep what is known in ``out`` from the start, should this process be ended."""
    case = Case(**json.loads(case_text))
    machine = facts(torch.device(case.device))
    row = case.row(str(machine["device"]))
    _keep(Path(out), row, machine)
    try:
        row = Run(case).measure(row)
    except RefusalError as error:
        row = replace(row, reason=str(error))
    except Exception as error:
        traceback.print_exc()
        row = replace(row, reason=one_line(error))
    _keep(Path(out), row, machine)


def _keep(path: Path, row: Row, machine: Mapping[str, str | None]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"row": asdict(row), "machine": machine}))
    temporary.replace(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
