"""The lines of the benchmark of several GPUs: what was measured, and on which machine."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one model and one number of GPUs.

    Attributes:
        method: ``poetx`` or ``adamw`` through DistributedDataParallel, or ``fsdp2``: AdamW through FSDP2.
        compress: ``bf16`` where gradients travel as bfloat16 by torch's hook, ``none`` where they travel as they are.
        compiled: ``model`` as one module, or its ``layers`` one by one.
        inner: what compiles: ``inductor``, or ``aot_eager`` for a check of the script.
        split: whether Dynamo's DDPOptimizer may cut the model's graph by buckets.
        bucket_mb: MiB in a bucket of DistributedDataParallel's.
        ctas: thread blocks that NCCL may take (``NCCL_MAX_CTAS``), each a processor's; 0 leaves it to NCCL.
        ranks: GPUs, one process each. On one there is no wrapper.
        batch, seq: sequences, and tokens in each, on every rank.
        block, skew_dtype, updates: poetx's ``block_size``, the type of ``q``, its gradients and its states, and ``updates``.
        ms_median, ms_q20, ms_q80: milliseconds of a step on the slowest rank.
        tokens_per_second: of one rank.
        efficiency: ``tokens_per_second`` over that of the same method on one rank.
        payload_bytes: handed to collectives by one rank in a step.
        wire_bytes: what one rank sends of them in a ring: ``2 (ranks - 1) / ranks`` of an all-reduce, half of that of an
            all-gather or a reduce-scatter.
        counted_by: ``hook`` where DistributedDataParallel's buckets were counted, ``arithmetic`` for FSDP2.
        communication_ms, exposed_ms: NCCL kernels of one step, and the part of it when no other kernel ran.
        peak_mib: of tensors on a GPU, the largest of all ranks.
        compile_seconds: from the model in memory to the end of the first step.
        reason: why there are no numbers.
    """

    model: str
    method: str
    compress: str
    compiled: str
    inner: str
    split: bool
    bucket_mb: int
    ctas: int
    ranks: int
    batch: int
    seq: int
    block: int | None
    skew_dtype: str
    updates: str
    parameters: int | None = None
    steps: int | None = None
    ms_median: float | None = None
    ms_q20: float | None = None
    ms_q80: float | None = None
    tokens_per_second: float | None = None
    efficiency: float | None = None
    payload_bytes: int | None = None
    wire_bytes: int | None = None
    counted_by: str = ""
    communication_ms: float | None = None
    exposed_ms: float | None = None
    peak_mib: float | None = None
    compile_seconds: float | None = None
    reason: str = ""
    facts: dict[str, str | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.method if self.compress == "none" else f"{self.method}, {self.compress} gradients"

    @property
    def described(self) -> str:
        """The label, and what was not left as it is by default."""
        others = {
            "updates as given": self.updates == "given",
            f"q in {self.skew_dtype}": self.skew_dtype not in ("", "float32"),
            "graphs not split": not self.split,
            f"{self.ctas} blocks of NCCL": bool(self.ctas),
        }
        return ", ".join([self.label, *(text for text, holds in others.items() if holds)])

    @property
    def case(self) -> tuple[Any, ...]:
        """What was asked for: a later row of the same case replaces this one."""
        return tuple(getattr(self, name) for name in ASKED)

    def runs_alone(self, other: Row) -> bool:
        """Whether ``other`` is the same work on one rank, where nothing travels."""
        same = ("model", "method", "compiled", "inner", "batch", "seq", "block", "skew_dtype", "updates")
        return other.ranks == 1 and all(getattr(self, name) == getattr(other, name) for name in same)


ASKED = (
    *("model", "method", "compress", "compiled", "inner", "split", "bucket_mb", "ctas", "ranks", "batch", "seq"),
    *("block", "skew_dtype", "updates"),
)
FACTS = ("device", "torch", "triton", "cuda", "driver", "transformers", "date", "poetx_compile")
_COLUMNS = [name for name in get_type_hints(Row) if name != "facts"]


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    return [_with_efficiency(row, rows) for row in rows]


def _with_efficiency(row: Row, rows: Sequence[Row]) -> Row:
    base = next((other.tokens_per_second for other in rows if row.runs_alone(other)), None)
    if not base or not row.tokens_per_second:
        return row
    return dataclasses.replace(row, efficiency=row.tokens_per_second / base)


def fewer_bytes(row: Row, rows: Sequence[Row]) -> float | None:
    """Bytes on the wire of AdamW through DDP on the same model and ranks, over those of ``row``."""
    for other in rows:
        if (
            (other.method, other.model, other.ranks) == ("adamw", row.model, row.ranks)
            and other.wire_bytes
            and row.wire_bytes
        ):
            return other.wire_bytes / row.wire_bytes
    return None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *FACTS])
        for row in rows:
            writer.writerow([getattr(row, name) for name in _COLUMNS] + [row.facts.get(name) for name in FACTS])
    temporary.replace(path)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(**{name: _parse(name, line[name]) for name in _COLUMNS}, facts={name: line[name] or None for name in FACTS})
        for line in lines
    ]


_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("model", "method", "compress", "compiled", "inner", "skew_dtype", "updates", "counted_by", "reason"), str
    ),
    **dict.fromkeys(
        ("bucket_mb", "ctas", "ranks", "batch", "seq", "block", "parameters", "steps", "payload_bytes", "wire_bytes"), int
    ),
    "split": lambda text: text == "True",
}


def _parse(name: str, text: str) -> Any:
    read = _TYPES.get(name, float)
    return None if not text and read is not str else read(text)
