"""What is rehearsed while a graph is compiled, that it changes nothing, and who waits for it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Experts, network
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import poetx_compile
from poetx_compile import PoetxConfig, conversion, optimizer
from poetx_compile._torch.tensors import fake_tensors
from poetx_compile.backend import convert
from poetx_compile.estimate import trace
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import gluon_rotate, group, ops, rehearsal, tuning
from poetx_compile.kernels.rehearsal import PARTS, Kind, Side
from poetx_compile.layout import BlockLayout
from poetx_compile.passes import LinearMatch
from poetx_compile.registry import factors

SCRIPT = Path(__file__).with_name("rehearsed.py")


def converted(model: nn.Module, x: Tensor, **options: Any) -> list[tuple[LinearMatch, OrthogonalFactor]]:
    found: list[Any] = []

    def backend(gm: Any, examples: list[Any]) -> Any:
        found.extend(convert(gm, examples, PoetxConfig(**OPTIONS | options))[1])
        return gm.forward

    torch.compile(model, backend=backend)(x)
    return found


def kinds_of(model: nn.Module, x: Tensor, **options: Any) -> list[Kind]:
    """Of each use of each weight that a conversion finds."""
    return [kind for found, factor in converted(model, x, **options) for kind in conversion.kinds(found, factor)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rehearse CPU weights too, whose operations compile nothing; forget all of it afterwards."""
    for name in ("fits", "makes_rotations"):
        monkeypatch.setattr(rehearsal, name, lambda *operands: True)
    monkeypatch.setattr(rehearsal, "_known", set())
    yield
    rehearsal.join()


class TestKinds:
    def test_of_products(self) -> None:
        first, second = kinds_of(network(torch.float32), torch.randn(4, 22), route="gram")
        assert (first.activations, first.bias_side, first.dtype, first.stored) == (torch.float32, 0, torch.float32, None)
        assert (second.activations, second.bias_side) == (torch.float32, None)
        assert (first.rows.width, first.columns.width, first.columns.features) == (16, 16, 22)

    def test_of_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            kinds = kinds_of(network(torch.float32), torch.randn(4, 22), route="gram")
        assert {(kind.activations, kind.dtype) for kind in kinds} == {(torch.bfloat16, torch.float32)}

    @pytest.mark.parametrize(("storage", "stored"), [("int8", torch.int8), ("bf16-lean", torch.bfloat16)])
    def test_of_lean_weights(self, storage: str, stored: torch.dtype) -> None:
        kinds = kinds_of(network(torch.bfloat16), torch.randn(4, 22, dtype=torch.bfloat16), storage=storage)
        assert {(kind.stored, kind.precision) for kind in kinds} == {(stored, "tf32")}

    def test_of_the_dense_route(self) -> None:
        kinds = kinds_of(Experts(torch.float32), torch.randn(4, 22), include_conv=True)
        assert len(kinds) == 3
        assert all(kind.activations is None and kind.bias_side is None for kind in kinds)

    def test_of_a_weight_stored_inputs_first(self) -> None:
        class Turned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.bias = nn.Parameter(torch.randn(32, 48)), nn.Parameter(torch.zeros(48))

            def forward(self, x: Tensor) -> Tensor:
                return torch.addmm(self.bias, x, self.weight)

        assert [kind.bias_side for kind in kinds_of(Turned(), torch.randn(4, 32), route="gram")] == [1]
        assert [kind.bias_side for kind in kinds_of(Turned(), torch.randn(4, 32), route="gram", sides="rows")] == [None]

    def test_layers_of_one_kind(self) -> None:
        """However many blocks they have."""
        sizes = ((512, 1024), (1024, 512), (2048, 512))
        layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in sizes[:2]))
        assert len(set(kinds_of(layers, torch.randn(2, 1024)[:, :512], route="gram", block_size=256, chunk=32))) == 1

    def test_nothing_without_values(self) -> None:
        found, factor = converted(network(torch.float32), torch.randn(4, 22))[0]
        assert conversion.kinds(found, factor)
        with fake_tensors():
            fake = nn.Parameter(torch.empty(found.weight.shape))
        assert not conversion.kinds(replace(found, weight=fake), factor)


@pytest.mark.parametrize("features", (16, 22, 100, 1000, 4096, 14336))
@pytest.mark.parametrize(("block", "chunk"), ((16, 4), (256, 0), (250, 1), (33, 1)))
def test_a_small_side_is_as_aligned_as_a_large_one(features: int, block: int, chunk: int) -> None:
    layout = BlockLayout.of(features, block, chunk)
    side = Side.small(features, layout.count, layout.width, layout.run)
    assert side.features % 16 == features % 16
    assert (side.features == side.blocks * side.width) == (features == layout.rotated)
    assert side.blocks * side.width * (side.width - 1) % 8 == layout.rotated * (layout.width - 1) % 8
    assert side.features <= min(features, 16 * layout.width + 31)


ROWS, COLUMNS, NONE, WIDE = Side(40, 2, 16, 4), Side(33, 1, 32, 1), Side(7, 0, 0, 1), Side(600, 1, 600, 8)
KINDS = {
    "folded": Kind(torch.device("cpu"), torch.bfloat16, ROWS, COLUMNS, "tf32", None, 8, True, torch.bfloat16, 0),
    "float32": Kind(torch.device("cpu"), torch.float32, ROWS, COLUMNS, "tf32x3", None, 8, True, torch.bfloat16, 1),
    "dense": Kind(torch.device("cpu"), torch.float16, ROWS, COLUMNS, "tf32", None, 8, True),
    "lossy": Kind(torch.device("cpu"), torch.bfloat16, ROWS, COLUMNS, "tf32", None, 0, True, torch.bfloat16),
    "int8": Kind(torch.device("cpu"), torch.bfloat16, ROWS, COLUMNS, "tf32", torch.int8, 8, True, torch.bfloat16, 0),
    "lean": Kind(torch.device("cpu"), torch.bfloat16, ROWS, COLUMNS, "tf32", torch.bfloat16, 8, True, torch.bfloat16),
    "rows": Kind(torch.device("cpu"), torch.float32, ROWS, NONE, "tf32x3", None, 8, True, torch.float32, 0),
    "columns": Kind(torch.device("cpu"), torch.bfloat16, NONE, COLUMNS, "tf32", torch.int8, 8, True, torch.bfloat16),
    "wide": Kind(torch.device("cpu"), torch.bfloat16, WIDE, COLUMNS, "tf32", None, 8, True, torch.bfloat16),
    "wide float32": Kind(torch.device("cpu"), torch.float32, WIDE, COLUMNS, "tf32x3", None, 8, True, torch.float32),
}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_runs_and_leaves_no_trace(kind: str, part: Any) -> None:
    before = torch.get_rng_state(), torch.get_float32_matmul_precision(), torch.get_default_dtype(), len(factors)
    part(KINDS[kind])
    after = torch.get_rng_state(), torch.get_float32_matmul_precision(), torch.get_default_dtype(), len(factors)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Which variants of which kernels are launched, as Triton tells them apart; CPU tensors stand for a GPU's, and none runs."""
    effective, polar = (importlib.import_module(f"poetx_compile.kernels.{name}") for name in ("effective", "polar"))
    variants: set[tuple[str, str]] = set()
    target = make_backend(GPUTarget("cuda", 90, 32))

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        _, key, options = create_function_from_signature(kernel.signature, kernel.params, target)(*args, **settings)
        variants.add((f"{kernel.__module__}.{kernel.__name__}", f"{key} {options}"))

    def fits(tensor: Tensor, *widths: int) -> bool:
        return tensor.dtype != torch.float64 and max(widths, default=0) <= tuning.WIDEST

    for module in (ops, group, effective, polar, rehearsal):
        monkeypatch.setattr(module, "fits", fits)
    load = partial(importlib.import_module, package="poetx_compile.kernels")
    for module in (ops, effective, polar):
        monkeypatch.setattr(module, "for_hopper", lambda name, device: load(f".{name}"))
    monkeypatch.setattr(gluon_rotate, "distances_of", lambda operands: torch.zeros(6 * len(operands), dtype=torch.int64))
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(JITFunction, "run", note)
    return variants


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_changes_no_setting_of_other_threads(
    kind: str, launched: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a while: a graph may be captured, or compiled, beside it."""

    def refuse(device: torch.device) -> None:
        raise AssertionError("the precision of products is one for all threads")

    for name in ("naive", "group", "polar"):
        monkeypatch.setattr(importlib.import_module(f"poetx_compile.kernels.{name}"), "full_precision", refuse)
    for part in PARTS:
        part(KINDS[kind])
    assert launched


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")  # no kernel runs: what it would write is what memory held before
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize(
    ("m", "n", "settings"),
    [
        (1024, 768, {}),
        (2048, 1024, {"chunk": 0}),
        (640, 768, {"block_size": 768}),
        (1000, 304, {"block_size": 128}),
        (999, 250, {"block_size": 33, "chunk": 1}),
        (64, 6, {"block_size": 32}),
        (1024, 512, {"sides": "rows"}),
        (1024, 512, {"sides": "columns"}),
        (1024, 512, {"route": "dense", "storage": "folded"}),
        (8320, 256, {"block_size": 64, "chunk": 16}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(torch.float32, "folded"), (torch.bfloat16, "folded"), (torch.bfloat16, "int8"), (torch.float16, "bf16-lean")],
    ids=str,
)
def test_a_step_launches_no_variant_that_was_not_rehearsed(
    dtype: torch.dtype,
    storage: str,
    m: int,
    n: int,
    settings: dict[str, Any],
    bias: bool,
    launched: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[Kind] = []
    monkeypatch.setattr(rehearsal, "start", kinds.extend)
    model = nn.Linear(n, m, bias, dtype=dtype)
    adam = torch.optim.AdamW(model.parameters())
    options = {"route": "gram", "block_size": 256, "chunk": 32, "storage": storage, "inner": "aot_eager"} | settings
    compiled = torch.compile(model, backend="poetx", options=options)
    compiled(torch.zeros(300, n, dtype=dtype, requires_grad=True)).sum().backward()
    adam.step()
    real = launched.copy()
    launched.clear()
    for kind in kinds:
        for part in PARTS:
            part(kind)
    is_done_without = dtype == torch.float32 and settings.get("block_size", 0) > tuning.WIDEST
    expected = {"_pack_kernel"} if is_done_without else {"_pack_kernel", "_far_kernel"}
    assert expected <= {name.rpartition(".")[2] for name, _ in real}
    if (m, n, dtype, storage) == (1024, 768, torch.bfloat16, "folded"):
        ours = {name.rpartition(".")[0] for name, _ in real}
        assert {"poetx_compile.kernels.gluon_rotate", "poetx_compile.kernels.gluon_polar"} <= ours
    assert real <= launched


class TestThreads:
    def test_a_compiled_graph_waits_for_them(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        go, done, join = threading.Event(), [], rehearsal.join

        def slow(kind: Kind) -> None:
            go.wait(30)
            done.append(kind)

        def joining() -> None:
            if rehearsal._running:
                go.set()
            join()

        monkeypatch.setattr(rehearsal, "PARTS", (slow,))
        monkeypatch.setattr(rehearsal, "join", joining)
        torch.compile(network(torch.float32), backend="poetx", options=OPTIONS)(torch.randn(4, 22))
        assert len(done) == 2
        assert not rehearsal._running

    def test_a_step_waits_for_them(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of weights that were prepared, and have had a gradient in no compiled graph."""
        folded: list[str] = []
        monkeypatch.setattr(rehearsal, "PARTS", (lambda kind: (time.sleep(0.2), folded.append("rehearsed")),))
        monkeypatch.setattr(optimizer, "retract_all", lambda *work: folded.append("folded"))
        model = network(torch.float32)
        poetx_compile.prepare(model, torch.randn(4, 22), options=OPTIONS)
        model(torch.randn(4, 22)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert folded == ["rehearsed", "rehearsed", "folded"]

    def test_each_kind_is_rehearsed_once(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[Kind] = []
        monkeypatch.setattr(rehearsal, "PARTS", (done.append,))
        for _ in range(2):
            poetx_compile.prepare(network(torch.float32), torch.randn(4, 22), options=OPTIONS)
            rehearsal.join()
            assert len(done) == 2

    def test_an_error_is_dropped(
        self, on_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(kind: Kind) -> None:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(rehearsal, "PARTS", (fails,))
        with caplog.at_level("DEBUG", "poetx_compile"):
            torch.compile(network(torch.float32), backend="poetx", options=OPTIONS)(torch.randn(4, 22))
            rehearsal.join()
        assert "no such kernel" in caplog.text
        assert {record.levelname for record in caplog.records if "rehearsal" in record.name} == {"DEBUG"}

    def test_a_process_without_more_threads_trains(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(rehearsal.threading.Thread, "start", start)
        model = network(torch.float32)
        torch.compile(model, backend="poetx", options=OPTIONS)(torch.randn(4, 22)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not rehearsal._running

    def test_modes_of_the_calling_thread_stay_there(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []
        monkeypatch.setattr(rehearsal, "PARTS", (lambda kind: seen.append(kind.zeros(2) + 1),))
        with fake_tensors():
            rehearsal.start([KINDS["folded"]])
            rehearsal.join()
        assert seen[0].tolist() == [1, 1]

    def test_a_thread_stays_off_the_first_device(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which each thread begins on: to be set there takes memory for a context, of every rank."""
        here, seen = threading.local(), []

        def current() -> int:
            return getattr(here, "device", 0)

        def move(device: torch.device) -> None:
            here.device = device.index
            seen.append(device.index)

        def stream_of(device: torch.device | None) -> Any:
            device = torch.device("cuda", current()) if device is None else device
            return SimpleNamespace(device=device, synchronize=lambda: None)

        monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *given: current())
        monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "set_device", move)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: move(stream.device))
        monkeypatch.setattr(rehearsal, "_stream", stream_of)
        monkeypatch.setattr(rehearsal, "_has_kernels", lambda kind: True)
        monkeypatch.setattr(rehearsal, "PARTS", (lambda kind: None,))
        rehearsal.start([KINDS["folded"]._replace(device=torch.device("cuda", 3))])
        rehearsal.join()
        assert set(seen) == {3}

    def test_cpu_weights_and_estimates_start_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[Any] = []
        monkeypatch.setattr(rehearsal.threading, "Thread", lambda **settings: started.append(settings))
        poetx_compile.prepare(network(torch.float32), torch.randn(4, 22), options=OPTIONS)
        monkeypatch.setattr(rehearsal, "fits", lambda tensor, *widths: True)
        build = partial(nn.Linear, 22, 32)
        assert trace(build, lambda model: model(torch.randn(4, 22)).sum(), PoetxConfig(**OPTIONS)).factors
        assert not started

    def test_a_forked_process_does_not_wait(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        go = threading.Event()
        monkeypatch.setattr(rehearsal, "PARTS", (lambda kind: go.wait(30),))
        rehearsal.start([KINDS["folded"]])
        child = os.fork()
        if not child:
            rehearsal.join()
            os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert rehearsal._running
        go.set()

    def test_a_process_ends_in_the_middle_of_a_compilation(self) -> None:
        """Without waiting it would abort, since native code cannot outlive the interpreter."""
        command, environment = [sys.executable, str(SCRIPT), "leave"], os.environ | {"TRITON_ALWAYS_COMPILE": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        assert "compiling" in finished.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ("folded", "int8"))
@pytest.mark.parametrize("width", (256, 96))
def test_the_first_step_compiles_no_kernel_of_ours(storage: str, width: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), storage, str(width)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
