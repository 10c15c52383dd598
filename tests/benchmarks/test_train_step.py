from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--device", "cpu", "--sizes", "tiny", "--seq", "16", "--compiler", "aot_eager", "--steps", "2", "--warmup", "1"]
LINEARS = 2 * (4 * 256 * 256 + 3 * 256 * 512)
"""Numbers in the linear layers of the tiny model."""
OUTSIDE = (2 * 512 + 5) * 256

OFFICIAL = """
import dataclasses
import torch


@dataclasses.dataclass
class POETConfig:
    block_size: int
    merge_interval: int
    mem_efficient_mode: bool


class POETModel(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        if config.mem_efficient_mode:
            raise NotImplementedError("not\\nhere")
        self.base_model = model

    def forward(self, **batch):
        return self.base_model(**batch)

    def merge(self):
        weight = self.base_model.lm_head.weight.detach().float()
        for _ in range(50):
            weight @ weight.t()


def get_poet_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=1e-4)
"""
"""What we use of the authors' package, in its place."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train_step

    yield train_step


def run(bench: ModuleType, out: Path, *extra: str) -> list[tuple[object, dict[str, str]]]:
    import rows

    bench.main([*SMALL, "--out", str(out), *extra])
    return rows.read_csv(out, bench.Row)


def test_measures_each_method_in_a_process_of_its_own(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that is missing, and one that breaks, are rows among the others."""
    missing = tmp_path / "packages"
    missing.mkdir()
    (missing / "galore_torch.py").write_text("raise ModuleNotFoundError('no', name='galore_torch')")
    (missing / "apollo_torch.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", f"{missing}:{BENCHMARKS.parent}")
    out = tmp_path / "X.csv"
    methods = "poetx:block_size=128,adamw,galore,apollo"
    found = run(bench, out, "--methods", methods, "--micro", "2", "--peak-flops", "1e12", "--peak-bandwidth", "1e10")

    assert [row.method for row, _ in found] == methods.split(",")
    poetx, adamw, galore, apollo = (row for row, _ in found)
    assert galore.reason == "not installed: galore_torch"
    assert apollo.reason.startswith("the process ended with 7")
    assert galore.step_ms is None is apollo.step_ms
    for row, machine in found:
        assert (row.size, row.layers, row.is_cut, row.seq, row.batch, row.micro) == ("tiny", 2, 0, 16, 1, 2)
        assert (row.compiler, row.caches, row.parameters) == (
            "aot_eager",
            "shared",
            None if row.reason else LINEARS + OUTSIDE,
        )
        assert (machine["torch"], machine["driver"]) == (torch.__version__, "")
        assert machine["device"].endswith("CPU")
        assert datetime.fromisoformat(machine["date"]).tzinfo
    for row in (poetx, adamw):
        assert 0 < row.step_ms_q20 <= row.step_ms <= row.step_ms_q80 and isfinite(row.loss)
        assert row.tokens_per_s == pytest.approx(32e3 / row.step_ms)
        assert row.gap == pytest.approx(row.step_ms / row.floor_ms)
        assert min(row.forward_ms, row.backward_ms, row.optimizer_ms, row.first_step_s) > 0
        assert (row.timed_by, row.steps, row.peak_bytes, row.reason) == ("clock", 2, None, "")

    skews = 2 * (4 * 512 + 3 * 768) * 127 // 2  # blocks of 128: 127 / 2 numbers a channel
    assert (adamw.trained, poetx.trained) == (LINEARS + OUTSIDE, skews + OUTSIDE)
    assert 0 < poetx.retraction_ms < poetx.optimizer_ms and adamw.retraction_ms is None
    assert poetx.residual_bytes == LINEARS and adamw.residual_bytes == 0
    assert poetx.weight_bytes == adamw.weight_bytes
    assert 0 <= adamw.weight_bytes - 2 * (LINEARS + OUTSIDE) < 4096  # the rest: frequencies of the rotary embedding
    assert adamw.gradient_bytes == 2 * (LINEARS + OUTSIDE)
    assert poetx.gradient_bytes == 2 * OUTSIDE + 4 * skews
    counters = 4 * len(list(bench_parameters(bench)))
    assert adamw.state_bytes == 4 * (LINEARS + OUTSIDE) + counters
    permutations = 8 * 2 * (4 * 512 + 3 * 768)
    assert poetx.state_bytes == 4 * OUTSIDE + 3 * 4 * skews + permutations + counters

    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "galore, 1 x 16 tokens, 2 micro-batches: not installed: galore_torch" in printed
    assert "| tiny | 2 × 1 × 16 | adamw |" in printed


def bench_parameters(bench: ModuleType) -> Iterator[torch.nn.Parameter]:
    import llama

    return llama.build(bench.SIZES["tiny"], 16, torch.device("cpu")).parameters()


def test_official_rows_have_their_share_of_a_merge(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "poet_torch.py").write_text(OFFICIAL)
    methods = "official-fast:merge_interval=4,official-mem,official-fast-eager"
    found = run(bench, tmp_path / "X.csv", "--methods", methods, "--official", str(tmp_path), "--layers", "1")
    fast, mem, eager = (row for row, _ in found)
    assert mem.reason == "NotImplementedError: not here"
    for row, period in ((fast, 4), (eager, 200)):
        assert (row.layers, row.is_cut, row.rare_period) == (1, 1, period)
        assert row.retraction_ms == pytest.approx(row.rare_ms / period) and row.rare_ms > 0
        assert row.step_ms > row.retraction_ms and row.optimizer_ms > row.retraction_ms
        assert f"with 1/{period} of the merge, {row.rare_ms:.1f} ms each time" in row.note
    (without,) = (row for row, _ in run(bench, tmp_path / "Y.csv", "--methods", "official-fast"))
    assert without.reason.startswith("needs --official DIR")


def test_new_permutations_have_their_share(bench: ModuleType, tmp_path: Path) -> None:
    methods = "poetx:permutation_period=50"
    ((found, _),) = run(bench, tmp_path / "X.csv", "--methods", methods, "--layers", "1")
    assert found.rare_period == 50 and found.rare_ms > 0
    assert found.rare_ms / 50 < found.retraction_ms < found.optimizer_ms
    assert found.note.startswith("step and optimizer with 1/50 of the new permutations")


def test_a_process_that_takes_too_long_is_a_row(bench: ModuleType, tmp_path: Path) -> None:
    (row,) = (row for row, _ in run(bench, tmp_path / "X.csv", "--methods", "adamw", "--timeout", "0.5"))
    assert (row.reason, row.flops > 0, row.step_ms) == ("not finished after 0.5 s", True, None)
    (row,) = (row for row, _ in run(bench, tmp_path / "Y.csv", "--methods", "adamw", "--minutes", "0"))
    assert row.reason == "left out: --minutes were used up before"


def test_rows_are_added_to_a_file_of_the_same_columns(bench: ModuleType, tmp_path: Path) -> None:
    """Lines of known machines and of unknown ones."""
    import rows

    out = tmp_path / "X.csv"
    for machine in (rows.facts(torch.device("cpu")), {}):
        rows.append_csv(out, row(bench), machine)
    found = run(bench, out, "--methods", "adamw", "--minutes", "0")
    assert [bool(machine["device"]) for _, machine in found] == [True, False, False]
    assert [machine["torch"] for _, machine in found] == [torch.__version__, "", ""]
    out.write_text("size,layers\n")
    with pytest.raises(ValueError, match=r"has other columns .*method"):
        run(bench, out, "--methods", "adamw", "--minutes", "0")


def memory_of(bench: ModuleType, most: int, tried: list[int], failure: str = "") -> Callable[[object], object]:
    """Measures batches up to ``most``."""

    def measure(case: object) -> object:
        tried.append(case.batch)
        reason = failure or ("" if case.batch <= most else "OutOfMemoryError: CUDA out of memory. Tried to allocate")
        return dataclasses.replace(case.row(""), reason=reason, step_ms=None if reason else 1.0), {"device": "X"}

    return measure


@pytest.mark.parametrize(
    ("first", "most", "batch", "tried"),
    [
        (1, 5, 4, [1, 2, 4, 8]),
        (4, 5, 4, [4, 8]),
        (8, 3, 2, [8, 4, 2]),
        (2, 0, 1, [2, 1]),
        (1, 0, 1, [1]),
    ],
)
def test_searches_the_largest_batch(bench: ModuleType, first: int, most: int, batch: int, tried: list[int]) -> None:
    case = bench.Case("tiny", "adamw", 16, first, 1, device="cpu")
    seen: list[int] = []
    row, machine = bench.largest_that_fits(memory_of(bench, most, seen), case)
    assert (row.batch, row.fits, seen, machine) == (batch, "max", tried, {"device": "X"})
    assert row.is_out_of_memory == (most == 0)


def test_a_search_ends_at_another_failure(bench: ModuleType) -> None:
    case = bench.Case("tiny", "adamw", 16, 4, 1, device="cpu")
    seen: list[int] = []
    row, _ = bench.largest_that_fits(memory_of(bench, 64, seen, "ValueError: no"), case)
    assert (row.reason, row.fits, seen) == ("ValueError: no", "max", [4])

    def measure(case: object) -> object:
        return memory_of(bench, 64, seen, "" if case.batch < 8 else "not finished after 9 s")(case)

    row, _ = bench.largest_that_fits(measure, case)
    assert (row.batch, row.reason, row.note) == (4, "", "a batch of 8 failed: not finished after 9 s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sgd"], "no method 'sgd'; there are poetx, adamw"),
        (["--methods", "adamw:rank=4"], "adamw takes mode, checkpointing, regional, not rank"),
        (["--methods", "poetx:checkpointing=yes"], "checkpointing is True or False, not 'yes'"),
        (["--methods", "lora:checkpointing=True"], "lora takes mode, r, not checkpointing"),
        (["--device", "cpu", "--cap", "24"], "--cap bounds the allocator of CUDA devices, and --device is cpu"),
        (["--device", "cuda", "--cap", "nan"], "nan is not a positive number"),
        (["--device", "cuda", "--cap", "-1"], "-1 is not a positive number"),
        (["--methods", "lora:8"], "'8' is no option=value"),
        (["--sizes", "70b"], "no size 70b"),
        (["--micro", "0"], "0 is not a positive number"),
    ],
)
def test_refuses_what_it_does_not_know(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


def test_reads_options_and_batches(bench: ModuleType) -> None:
    spec = bench.Spec.parse("poetx:block_size=128:precision=ieee:mode=reduce-overhead")
    assert (spec.options, spec.mode, spec["block_size"]) == (
        {"block_size": 128, "precision": "ieee"},
        "reduce-overhead",
        128,
    )
    assert bench.Spec.parse("lora")["r"] == 160
    assert bench.parse(["--batch", "2,max,max:8"]).batch == [(2, False), (1, True), (8, True)]


def test_floors_by_hand(bench: ModuleType) -> None:
    """A model of two channels: h = 2, f = 4, one layer, vocabulary 8, 3 tokens; 4 bytes a channel and side are 2 numbers."""
    from floors import Kernel
    from model_floors import Load

    size = bench.SIZES["tiny"].__class__(2, 4, 1, 1, 8)
    assert size.parameters == 4 * 4 + 3 * 8 + (2 * 8 + 3) * 2 == 78
    load = Load(size, batch=1, length=3)
    square, oblong = Kernel(24, 2 * (6 + 6 + 4)), Kernel(48, 2 * (6 + 12 + 8))
    attention = [Kernel(2 * 18, 4 * 12), Kernel(4 * 18, 8 * 12)]
    head, table = Kernel(96, 2 * (6 + 24 + 16)), [Kernel(0, 24), Kernel(0, 2 * (3 + 8) * 2)]

    found = load.adamw()
    assert found.training == [*12 * [square], *9 * [oblong], *attention, *3 * [head], *table]
    assert found.optimizer == [Kernel(0, 14 * 78)]
    assert found.retraction == ()
    assert (found.flops, found.bytes) == (12 * 24 + 9 * 48 + 6 * 18 + 3 * 96, sum(k.bytes for k in found.training) + 14 * 78)
    assert Load(size, 1, 3, micro=2).adamw().training == 2 * found.training

    rotated = load.poetx(2)
    grams = {2: Kernel(24, 24), 4: Kernel(48, 48)}  # 2 N b (features) flops, two tensors in
    of_square, of_oblong = 2 * [square] + 2 * [grams[2]], 2 * [oblong]
    down = [*of_oblong, grams[2], grams[4]]
    up = [*of_oblong, grams[4], grams[2]]
    assert rotated.training == [*4 * of_square, *2 * up, *down, *attention, *3 * [head], *table]
    skews = 4 * 2 + 3 * 3  # (m + n) / 2 for blocks of two
    assert rotated.optimizer == [Kernel(0, 14 * 38), Kernel(0, 28 * skews)]
    cayley, turn = Kernel(48 * 2, 4 * 2), Kernel(4 * 4 * 2, 6 * 4)
    even = Kernel(9 * 8 * 2, 8 * 2)  # half of nine products of two blocks, 2 · 2³ flops each
    assert rotated.retraction[0] == even
    assert rotated.retraction[7:9] == [cayley, turn]
    assert len(rotated.retraction) == 21
    assert load.poetx(2, is_even=False).retraction == rotated.retraction[7:]

    assert load.eight_bit_adamw().optimizer == [Kernel(0, 10 * 78)]
    assert load.adafactor().optimizer == [Kernel(0, 6 * 78)]
    iteration = 2 * (2 * 2 * 2 * 4) + 2 * 8
    assert load.muon().optimizer[-1] == Kernel(5 * iteration, 10 * 8)
    assert load.low_rank(1, True).optimizer[-3:] == [Kernel(16, 2 * 14), Kernel(0, 40), Kernel(16, 2 * 22)]
    assert load.low_rank(1, False).optimizer[-3:] == [Kernel(16, 2 * 14), Kernel(0, 40), Kernel(0, 6 * 8)]

    adapted = load.lora(1)
    assert adapted.training[:8] == [*2 * [square], *3 * [Kernel(12, 2 * (3 + 6 + 2))], *3 * [Kernel(12, 2 * (6 + 3 + 2))]]
    assert adapted.training[-3:] == [*2 * [head], table[0]]
    assert adapted.optimizer == [Kernel(0, 14 * (4 * 4 + 3 * 6))]

    merged = load.official(2, is_lean=False, period=4)
    assert merged.optimizer == [Kernel(0, 14 * 38), Kernel(0, 14 * skews)]
    assert merged.retraction[:2] == [Kernel(24, 1), Kernel(8, 4)]


def test_an_8b_model_is_counted(bench: ModuleType) -> None:
    """8 billion parameters; AdamW's step of 2,048 tokens is 6 flops a parameter and token, and attention."""
    from floors import PEAKS
    from model_floors import Load

    load = Load(bench.SIZES["8b"], 1, 2048)
    assert load.size.parameters == 32000 * 2 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 14336) + 65 * 4096 == 8_047_038_464
    multiplied = load.size.parameters - 32000 * 4096 - 65 * 4096
    attention = 32 * 6 * 2048 * 2048 * 4096
    assert load.adamw().flops == 6 * 2048 * multiplied + attention
    least = load.adamw().ms(PEAKS["NVIDIA H100 80GB HBM3"])
    assert least["floor_optimizer_ms"] == pytest.approx(14 * load.size.parameters / 3.35e9)
    assert least["floor_ms"] == pytest.approx(
        sum(least[f"floor_{part}_ms"] for part in ("training", "optimizer", "retraction"))
    )
    assert set(load.adamw().ms(None).values()) == {None}


def test_a_cap_is_part_of_every_case_and_row(bench: ModuleType) -> None:
    """A point of searched batches has its own for each cap; a batch that was given is one point under all."""
    args = bench.parse(["--device", "cuda", "--cap", "23.5", "--sizes", "tiny", "--batch", "4,max"])
    capped = [case for case, _ in bench.cases(args)]
    assert {case.cap_bytes for case in capped} == {23_500_000_000}
    measured, _ = bench.largest_that_fits(memory_of(bench, 8, []), capped[-1])
    assert (measured.cap_bytes, measured.batch, measured.label) == (23_500_000_000, 8, "adamw, capped at 23.5 GB")

    given, searched = row(bench), row(bench, fits="max")
    assert given.point == dataclasses.replace(given, cap_bytes=24).point
    assert searched.point != dataclasses.replace(searched, cap_bytes=24).point
    assert searched.point == dataclasses.replace(searched, batch=4).point
    assert given.label == "poetx"


def test_what_is_planned_stands_beside_what_was_measured(bench: ModuleType) -> None:
    both = {"planned_bytes": 20_000_000_000, "cap_bytes": 24_000_000_000}
    steps = {"step_ms": 5.0, "tokens_per_s": 4e5, "first_step_s": 9.0, "peak_bytes": 21_000_000_000}
    fits, bursts = row(bench, **both, **steps), row(bench, **both, method="adamw", reason="OutOfMemoryError: no")
    head = "1 x 2048 tokens, 1 micro-batches: "
    assert f"8b, poetx, capped at 24 GB, {head}5.0 ms" in bench.told(fits)
    assert ", peak 21.0 GB, planned 20.0 GB, first step 9 s" in bench.told(fits)
    assert bench.told(bursts) == f"8b, adamw, capped at 24 GB, {head}OutOfMemoryError: no, planned 20.0 GB"

    uncapped = row(bench, **steps)
    heading, _, *lines = bench.markdown([fits, bursts, uncapped]).splitlines()
    headings = [cell.strip() for cell in heading.split("|")]
    cells = [dict(zip(headings, map(str.strip, line.split("|")))) for line in lines[:2]]
    assert [line["method"] for line in cells] == ["poetx, capped at 24 GB", "poetx"]
    assert [line["planned"] for line in cells] == ["20.00", ""]
    assert [line["peak / planned"] for line in cells] == ["1.05", ""]
    reason = "OutOfMemoryError: no (planned: 20.00 GB)"
    assert lines[2:] == ["", f"* 8b, 1 × 2048, adamw, capped at 24 GB: {reason}"]


def test_estimates_are_made_in_processes_of_their_own(bench: ModuleType, tmp_path: Path) -> None:
    """Of what is known, of what is not, and of what is wrong; in the time that is left."""
    from train_plan import planned_bytes

    methods = "poetx:storage=int8:checkpointing=True,adafactor,poetx:storge=int8"
    known, other, wrong = (found for found, _ in run(bench, tmp_path / "X.csv", "--methods", methods, "--plan"))
    (case, _), *_ = bench.cases(bench.parse([*SMALL, "--methods", methods]))
    assert known.planned_bytes == planned_bytes(case) > 0 and known.step_ms > 0
    assert (other.planned_bytes, other.note) == (None, "") and other.step_ms > 0
    assert wrong.planned_bytes is None and wrong.note.startswith("not planned: the process ended with 1")
    assert "did you mean 'storage'" in wrong.note and "did you mean 'storage'" in wrong.reason

    (late,) = (found for found, _ in run(bench, tmp_path / "Y.csv", "--methods", "adamw", "--plan", "--minutes", "0"))
    assert (late.planned_bytes, late.note) == (None, "not planned: --minutes were used up before")


@pytest.mark.parametrize("method", ("poetx:storage=int8:checkpointing=True", "adamw"))
def test_layers_compiled_one_by_one_train_as_the_whole_model(bench: ModuleType, tmp_path: Path, method: str) -> None:
    methods = f"{method},{method}:regional=True"
    whole, layers = (found for found, _ in run(bench, tmp_path / "X.csv", "--methods", methods))
    assert layers.reason == "" and layers.loss == pytest.approx(whole.loss, rel=5e-3)  # bfloat16, in other decompositions


def row(bench: ModuleType, **values: object) -> object:
    base = {"size": "8b", "layers": 32, "is_cut": 0, "method": "poetx", "compiler": "inductor", "seq": 2048, "batch": 1}
    return bench.Row(**{**base, "micro": 1, **values})


def test_the_table_has_the_last_row_of_each_method(bench: ModuleType, tmp_path: Path) -> None:
    import documents
    import train_table

    measured = {"tokens_per_s": 12345.6, "forward_ms": 40.0, "backward_ms": 50.04, "optimizer_ms": 9.0, "retraction_ms": 7.0}
    bytes_ = {"peak_bytes": 43_100_000_000, "weight_bytes": 16_000_000_000, "gap": 1.254, "floor_ms": 80.0}
    rows = [
        row(bench, step_ms=1.0),
        row(bench, method="adamw", reason="OutOfMemoryError: no"),
        row(bench, size="13b", layers=4, is_cut=1, fits="max", batch=8, micro=2, step_ms=2.0),
        row(bench, step_ms=99.0, **measured, **bytes_, note="so it is"),
    ]
    lines = bench.markdown(rows).splitlines()
    assert lines[0].startswith("| model | tokens a step | method | tokens/s | step, ms |")
    assert {line.count("|") for line in lines[:4]} == {21}
    cells = ["8b", "1 × 2048", "poetx", "12,346", "99.0", "40.0", "50.0", "9.0", "7.0", "43.10", "", "16.00"]
    assert [cell.strip() for cell in lines[2].split("|")[1:13]] == cells
    assert "| 80.0 | 1.25 |" in lines[2]
    assert lines[3].startswith("| 13b, 4 layers | 2 × 8 × 2048 (most that fits) | poetx |  | 2.0 |")
    assert lines[4:] == ["", "* 8b, 1 × 2048, poetx: so it is", "* 8b, 1 × 2048, adamw: OutOfMemoryError: no"]

    short = bench.markdown(rows, train_table.SHORT).splitlines()
    assert short[2] == "| 8b | 1 × 2048 | poetx | 12,346 | 99.0 | 9.0 | 7.0 | 43.10 | 1.25 |"
    assert bench.markdown(rows[1:2]).splitlines()[2:] == ["", "* 8b, 1 × 2048, adamw: OutOfMemoryError: no"]

    document = tmp_path / "README.md"
    document.write_text((BENCHMARKS.parent / "README.md").read_text())
    documents.write_into(document, {train_table.NAME: "a table"})
    assert "a table" in document.read_text()


def test_draws_speed_and_memory(bench: ModuleType, tmp_path: Path) -> None:
    import rows

    out = tmp_path / "X.csv"
    parts = {"weight_bytes": 16e9, "residual_bytes": 8e9, "gradient_bytes": 2e9, "state_bytes": 4e9, "rest_bytes": 9e9}
    measured = {name: int(value) for name, value in parts.items()} | {
        "peak_bytes": int(39e9),
        "tokens_per_s": 9e3,
        "gap": 1.5,
    }
    rows.append_csv(out, row(bench, reason="failed"), {})
    assert bench.plot_train.draw(out) == []
    rows.append_csv(out, row(bench, step_ms=227.0, **measured), {"device": "X"})
    rows.append_csv(out, row(bench, method="adamw", fits="max", batch=4, step_ms=500.0, tokens_per_s=8e3), {})
    assert bench.plot_train.draw(out) == [out.with_suffix(".png")]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_memory_counts_every_storage_once(bench: ModuleType) -> None:
    from memory import account

    class Projector:
        def __init__(self) -> None:
            self.matrix = torch.zeros(5)

    model = torch.nn.Linear(2, 2, bias=False)
    model.register_buffer("same", model.weight.detach())
    model.weight.grad = torch.zeros(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"a": [torch.zeros(3)], "b": Projector(), "c": model.weight.grad, "d": 3}
    found = account(model, [optimizer], torch.device("cpu"))
    assert found == {"weight_bytes": 16, "residual_bytes": 0, "gradient_bytes": 16, "state_bytes": 32}


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_parted(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(
        ["--sizes", "tiny", "--seq", "128", "--methods", "poetx,adamw", "--steps", "4", "--out", str(tmp_path / "X.csv")]
    )
    import rows

    for row, _ in rows.read_csv(tmp_path / "X.csv", bench.Row):
        parts = ("weight_bytes", "residual_bytes", "gradient_bytes", "state_bytes", "rest_bytes")
        assert row.peak_bytes == sum(getattr(row, part) for part in parts) <= row.reserved_bytes
        assert row.rest_bytes > 0 and row.timed_by == "events"
        assert row.step_ms > 0.5 * (row.forward_ms + row.backward_ms + row.optimizer_ms)


@pytest.mark.gpu
def test_on_a_gpu_no_process_holds_more_than_its_cap(bench: ModuleType, tmp_path: Path) -> None:
    """One that is enough, one that the making of the model exceeds, and one that the card has not."""
    import rows

    out = tmp_path / "X.csv"
    caps = ("2", "0.01", "100000")
    for cap in caps:
        bench.main(
            ["--sizes", "tiny", "--seq", "128", "--methods", "adamw", "--steps", "2", "--cap", cap, "--out", str(out)]
        )
    enough, too_little, too_much = (found for found, _ in rows.read_csv(out, bench.Row))
    assert [found.cap_bytes for found in (enough, too_little, too_much)] == [round(1e9 * float(cap)) for cap in caps]
    assert enough.step_ms > 0 and enough.reserved_bytes <= enough.cap_bytes
    assert too_little.is_out_of_memory and too_little.step_ms is None
    assert too_much.reason.startswith("--cap of 100000 GB is above the") and too_much.step_ms is None
