"""One rank of a case of ``ddp.py``, started by torchrun: builds the model, wraps it, trains, and measures its steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from ddp_rows import Row
from rows import facts
from timing import one_line
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import poetx_compile

WARM_UP = 4
"""Steps after the first: DistributedDataParallel makes its buckets anew after one, and allocators settle."""

SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16, vocab_size=32000),
    "3b": dict(hidden_size=2560, intermediate_size=7168, num_hidden_layers=32, num_attention_heads=20, vocab_size=32000),
}

Interval = tuple[float, float]


class Training:
    """A model, as a method wraps and compiles it, and its optimizer."""

    def __init__(self, case: Row, device: torch.device) -> None:
        self._case = case
        self.model = _llama(case, device)
        generator = torch.Generator(device).manual_seed(distributed.get_rank())
        vocabulary = self.model.config.vocab_size
        self._ids = torch.randint(vocabulary, (case.batch, case.seq), device=device, generator=generator)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.module = self._wrapped()
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=on_gpu)

    def step(self) -> None:
        self.module(input_ids=self._ids, labels=self._ids, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _wrapped(self) -> nn.Module:
        case = self._case
        settings: dict[str, Any] = {"backend": case.inner, "dynamic": False}
        if case.method == "poetx":
            options = {"block_size": case.block, "skew_dtype": case.skew_dtype, "inner": case.inner, "updates": case.updates}
            settings |= {"backend": "poetx", "options": options}
            if case.ranks > 1:
                one = self._ids[:1]  # prepare runs the model without a compiler, which takes more memory than a step
                poetx_compile.prepare(self.model, input_ids=one, labels=one, use_cache=False, options=options)
        if case.method == "fsdp2" and case.ranks > 1:
            from torch.distributed.fsdp import fully_shard

            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        for layer in self.model.model.layers if case.compiled == "layers" else (self.model,):
            layer.compile(**settings)
        if case.method == "fsdp2" or case.ranks == 1:
            return self.model
        wrapped = self._data_parallel()
        if case.compress == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def _data_parallel(self) -> DistributedDataParallel:
        return DistributedDataParallel(self.model, bucket_cap_mb=self._case.bucket_mb, gradient_as_bucket_view=True)

    def payload(self) -> tuple[int, int, str]:
        """Bytes handed to collectives in a step, bytes that one rank sends of them, and how they were counted."""
        ranks = self._case.ranks
        if ranks == 1:
            return 0, 0, ""
        if self._case.method == "fsdp2":
            once = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
            layers = sum(p.numel() * p.element_size() for p in self.model.model.layers.parameters())
            total = 2 * once + layers  # layers are gathered twice, gradients scattered once, each in the weights' dtype
            return total, total * (ranks - 1) // ranks, "arithmetic"
        self.module = self.model  # let the first wrapper's buckets go
        self.module = self._data_parallel()
        sent = count_buckets(self.module, bf16_compress_hook if self._case.compress == "bf16" else allreduce_hook)
        self.step()
        return sum(sent), sum(sent) * 2 * (ranks - 1) // ranks, "hook"


def count_buckets(module: DistributedDataParallel, hook: Callable[[Any, Any], Any]) -> list[int]:
    """Bytes of what ``hook`` sends, bucket by bucket: the list grows while the module trains."""
    sent: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch would compare annotations, and these are strings
        width = 2 if hook is bf16_compress_hook else bucket.buffer().element_size()
        sent.append(bucket.buffer().numel() * width)
        return hook(None, bucket)

    module.register_comm_hook(None, counting)
    return sent


def measure(case: Row, device: torch.device) -> Row:
    started = time.perf_counter()
    training = Training(case, device)
    training.step()
    _wait(device)
    compiled = time.perf_counter() - started
    for _ in range(WARM_UP):
        training.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    milliseconds = _times(training.step, case.steps or 1, device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    fifths = quantiles(milliseconds, n=5, method="inclusive")
    middle, low, high = _slowest([median(milliseconds), fifths[0], fifths[3]], device)
    communication, exposed = _communication(training.step) if device.type == "cuda" else (None, None)
    if case.method == "poetx" and case.ranks > 1:
        poetx_compile.check_ranks(training.model)
    payload, wire, counted_by = training.payload()
    return dataclasses.replace(
        case,
        parameters=training.parameters,
        ms_median=middle,
        ms_q20=low,
        ms_q80=high,
        tokens_per_second=1e3 * case.batch * case.seq / middle,
        payload_bytes=payload,
        wire_bytes=wire,
        counted_by=counted_by,
        communication_ms=communication,
        exposed_ms=exposed,
        peak_mib=None if peak is None else _slowest([peak], device)[0],
        compile_seconds=compiled,
    )


def intervals_alone(ours: Iterable[Interval], others: Iterable[Interval]) -> tuple[float, float]:
    """The length of the union of ``ours``, and of the part of it that ``others`` leave free."""
    ours, others = _union(ours), _union(others)
    together = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in ours for begin, stop in others)
    length = sum(end - start for start, end in ours)
    return length, length - together


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _communication(step: Callable[[], None]) -> tuple[float | None, float | None]:
    """Milliseconds of NCCL kernels in one step, waiting for the other rank among them; and with no other kernel beside.

    None where the profiler may not see kernels.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return None, None
    ours, others = [], []
    for event in kernels:
        (ours if event["name"].startswith("nccl") else others).append((event["ts"], event["ts"] + event["dur"]))
    length, alone = intervals_alone(ours, others)
    return length / 1e3, alone / 1e3


def _llama(case: Row, device: torch.device) -> LlamaForCausalLM:
    size = SIZES[case.model]
    config = LlamaConfig(**size, max_position_embeddings=case.seq, initializer_range=size["hidden_size"] ** -0.5)
    config.use_cache = False
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(dtype)


def _times(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Milliseconds from the end of one step to the end of the next, with no wait between them on a GPU."""
    distributed.barrier()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _slowest(numbers: Sequence[float], device: torch.device) -> list[float]:
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str]) -> None:
    """``ddp_rank.py DEVICE CASE OUT``: a device's type, a row as JSON, and the file that receives it with its numbers."""
    kind, text, out = argv
    asked = Row(**json.loads(text))
    torch._dynamo.config.optimize_ddp = asked.split
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = distributed.get_node_local_rank()
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    machine = facts(device)
    try:
        row = measure(asked, device)
    except Exception as error:
        Path(out).write_text(
            json.dumps(dataclasses.asdict(dataclasses.replace(asked, reason=one_line(error), facts=machine)))
        )
        raise
    if rank == 0:
        Path(out).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(row, facts=machine))))
    distributed.barrier()
    gc.collect()  # a wrapper that outlives the group may wait for ever for the thread that runs its hook
    with suppress(RuntimeError):
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
