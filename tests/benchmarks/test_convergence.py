from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH, BATCH, STEPS = 16, 4, 4
KINDS = {"prose": (0, 101), "code": (101, 181)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import convergence

    yield convergence


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    draw = np.random.default_rng(0)
    train = draw.integers(256, size=30 * LENGTH + 3).astype("<u2")
    train[1::2] = 511 - train[:-1:2]  # every second token follows from the one before
    train.tofile(folder / "train.bin")
    held_out = draw.integers(256, size=181).astype("<u2")
    held_out[1:101:2] = 511 - held_out[:100:2]  # in prose only
    held_out.tofile(folder / "val.bin")
    segments = [{"source": kind, "kind": kind, "start": start, "end": end} for kind, (start, end) in KINDS.items()]
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 512, "val_segments": segments}))
    return folder


@pytest.fixture
def command(corpus: Path, tmp_path: Path) -> list[str]:
    sizes = ["--size", "tiny", "--seq", str(LENGTH), "--batch", str(BATCH), "--steps", str(STEPS)]
    often = ["--log-every", "1", "--eval-every", "2", "--eval-batch", "3"]
    here = ["--device", "cpu", "--compiler", "aot_eager", "--jobs", "0"]
    return ["--corpus", str(corpus), *sizes, *often, *here, "--state", str(tmp_path / "state")]


def run(bench: ModuleType, *arguments: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)
    assert exit_.value.code == 0


class TestTokens:
    def make(self, corpus: Path, length: int = LENGTH) -> object:
        from convergence_data import Tokens

        return Tokens(corpus, length, torch.device("cpu"))

    def test_an_epoch_shows_each_window_once_and_the_next_another_order(self, bench: ModuleType, corpus: Path) -> None:
        tokens = self.make(corpus)
        stream = torch.from_numpy(np.fromfile(corpus / "train.bin", dtype="<u2").astype(np.int64))
        windows = {tuple(window.tolist()) for window in stream[: 30 * LENGTH].view(30, LENGTH)}
        steps = 30 // BATCH
        epochs = [
            [tuple(row.tolist()) for step in part for row in tokens.batch(0, step, BATCH)]
            for part in (range(steps), range(steps, 2 * steps))
        ]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == steps * BATCH
            assert set(epoch) <= windows
        assert epochs[0] != epochs[1]

    def test_batches_depend_on_seed_and_step_only(self, bench: ModuleType, corpus: Path) -> None:
        first, second = self.make(corpus), self.make(corpus)
        second.batch(0, 20, BATCH)
        assert torch.equal(first.batch(0, 9, BATCH), second.batch(0, 9, BATCH))
        assert not torch.equal(first.batch(0, 9, BATCH), first.batch(1, 9, BATCH))

    def test_large_tokens_keep_their_numbers(self, bench: ModuleType, corpus: Path) -> None:
        np.full(4 * LENGTH, 65_535, dtype="<u2").tofile(corpus / "train.bin")
        assert self.make(corpus).batch(0, 0, 1).unique().tolist() == [65_535]

    def test_validation_windows_lie_within_their_kind(self, bench: ModuleType, corpus: Path) -> None:
        tokens = self.make(corpus)
        assert tokens.kinds == ["code", "prose"]
        batches = tokens.validation_batches(4)
        counts = {kind: (end - start) // LENGTH for kind, (start, end) in KINDS.items()}
        assert [len(batch) for batch in batches] == [4] * -(-sum(counts.values()) // 4)
        stream = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype="<u2").astype(np.int64))
        expected = [
            stream[start : start + counts[kind] * LENGTH].view(-1, LENGTH)
            for kind, start in (("code", KINDS["code"][0]), ("prose", KINDS["prose"][0]))
        ]
        assert torch.equal(torch.cat(batches)[: sum(counts.values())], torch.cat(expected))
        losses = torch.cat([torch.full((counts["code"],), 1.0), torch.full((counts["prose"],), 4.0), torch.tensor([99.0])])
        total, by_kind = tokens.by_kind(losses)
        assert by_kind == {"code": 1.0, "prose": 4.0}
        assert total == pytest.approx((counts["code"] + 4 * counts["prose"]) / sum(counts.values()))

    def test_a_folder_without_the_files_says_which(self, bench: ModuleType, corpus: Path) -> None:
        (corpus / "val.bin").unlink()
        with pytest.raises(ValueError, match=r"has no val\.bin: a corpus is"):
            self.make(corpus)

    def test_a_part_that_is_too_short_is_named(self, bench: ModuleType, corpus: Path) -> None:
        with pytest.raises(ValueError, match=r"no window of 200 tokens in val\.bin"):
            self.make(corpus, 200)


RUNS = "poetx:lr=0.02:warmup=2:block_size=32:dtype=fp32,adamw:lr=0.01:warmup=2:dtype=fp32"


def test_an_interrupted_run_ends_with_the_same_bits(
    bench: ModuleType, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convergence_rows import by_run, read_csv

    weights: dict[str, list[dict[str, torch.Tensor]]] = {"whole": [], "resumed": []}
    train = bench.convergence_run.Run.train

    def train_and_keep(case: object) -> str:
        end = train(case)
        if end:
            weights[name].append({key: value.clone() for key, value in case.trained.module.state_dict().items()})
        return end

    monkeypatch.setattr(bench.convergence_run.Run, "train", train_and_keep)
    monkeypatch.setattr(bench, "START_SECONDS", -60.0)  # a run begins though no time is left, and stops at its first line
    name = "whole"
    command += ["--log-every", "2", "--runs", RUNS]
    run(bench, *command, "--out", str(tmp_path / "whole.csv"))
    name = "resumed"
    stopped = [*command, "--state", str(tmp_path / "other"), "--out", str(tmp_path / "resumed.csv"), "--minutes", "0"]
    for calls in range(1, STEPS // 2):
        run(bench, *stopped)
        found = by_run(read_csv(tmp_path / "resumed.csv"))
        assert [len(lines) for lines in found.values()] == [calls, calls]
        assert not any(lines[-1].row.end for lines in found.values())
        assert len(list((tmp_path / "other").glob("*.pt"))) == 2
    run(bench, *stopped)
    assert not list((tmp_path / "other").glob("*.pt"))

    for whole, resumed in zip(weights["whole"], weights["resumed"], strict=True):
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (by_run(read_csv(tmp_path / f"{name}.csv")) for name in weights)
    assert whole.keys() == resumed.keys()
    for key, lines in whole.items():
        for line, other in zip(lines, resumed[key], strict=True):
            for column in ("step", "tokens", "train_loss", "val_loss", "lr", "end", "by_kind"):
                assert getattr(line.row, column) == getattr(other.row, column)


def test_finished_runs_are_not_run_again_and_leave_csv_picture_and_table(
    bench: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convergence_rows import read_csv
    from plot_convergence import draw

    out = tmp_path / "result.csv"
    run(bench, *command, "--runs", RUNS, "--out", str(out))
    header = out.read_text().splitlines()[0].split(",")
    wanted = (
        "size recipe seed steps step tokens train_loss val_loss val_loss/code val_loss/prose lr seconds peak_bytes device"
    )
    assert {*wanted.split(), "torch", "date"} <= set(header)
    lines = read_csv(out)
    assert [line.row.step for line in lines] == [1, 2, 3, 4] * 2
    measured = [line.row for line in lines if line.row.val_loss is not None]
    assert [row.step for row in measured] == [2, 4, 2, 4]
    for first, last in (measured[:2], measured[2:]):
        assert last.val_loss < first.val_loss
        assert last.tokens == STEPS * BATCH * LENGTH
        assert last.epochs == pytest.approx(STEPS * BATCH / 30)
        assert last.end == "finished"
    picture = out.with_name(f"result-tiny-{STEPS}-0.png")
    assert picture.stat().st_size > 10_000
    assert draw(out, "final") == []  # no recipe of this question was run
    told = capsys.readouterr().out
    assert "2 of 2 runs have ended" in told
    assert "| `adamw:dtype=fp32:lr=0.01:warmup=2` |" in told

    before = out.read_text()
    run(bench, *command, "--runs", RUNS, "--out", str(out))
    assert out.read_text() == before


def test_processes_side_by_side_write_one_file_and_a_failure_is_told(
    bench: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convergence_rows import by_run, read_csv

    out = tmp_path / "result.csv"
    side_by_side = [*command, "--jobs", "2", "--steps", "2", "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        bench.main([*side_by_side, "--runs", "adamw:warmup=1:dtype=fp32,adamw:warmup=1:dtype=fp32:std=0.1,official"])
    assert exit_.value.code == 1
    told = capsys.readouterr().out
    assert "needs --official DIR" in told
    assert "2 of 3 runs have ended" in told
    found = by_run(read_csv(out))
    assert [key.recipe for key in found] == [f"adamw:dtype=fp32:lr=0.001{std}:warmup=1" for std in (":std=0.1", "")]
    assert {lines[-1].row.jobs for lines in found.values()} == {2}


def test_all_start_from_the_same_weights_whatever_the_dtype(bench: ModuleType) -> None:
    from convergence_recipes import SIZES, Place, Recipe

    place = Place(SIZES["tiny"], LENGTH, torch.device("cpu"), seed=3, compiler="aot_eager")
    exact, rounded = (
        Recipe.parse(text).make(place).module.state_dict() for text in ("adamw:dtype=autocast", "poetx:dtype=bf16")
    )
    for name, value in exact.items():
        assert torch.equal(value.bfloat16(), rounded[name])
    other = Recipe.parse("adamw:dtype=fp32:std=0.5").make(place).module.state_dict()
    assert other["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        "muon:dtype=autocast",
        "sgd",
        "poetx:residual_bits=4",
        "poetx-muon:block_size=32",
        "adamw:beta2=0.95",
        "poetx:gains=rows:spectrum=flat:scale=0.25",
    ],
)
def test_every_method_trains(bench: ModuleType, command: list[str], tmp_path: Path, recipe: str) -> None:
    from convergence_rows import read_csv

    out = tmp_path / "result.csv"
    run(bench, *command, "--runs", f"{recipe}:warmup=1", "--out", str(out))
    losses = [line.row.val_loss for line in read_csv(out) if line.row.val_loss is not None]
    assert losses[1] < losses[0]


def test_a_loss_that_is_not_finite_ends_its_run(bench: ModuleType, command: list[str], tmp_path: Path) -> None:
    from convergence_rows import read_csv

    out = tmp_path / "result.csv"
    run(bench, *command, "--runs", "sgd:dtype=fp32:lr=1e30:clip=1e30:warmup=0", "--out", str(out))
    last = read_csv(out)[-1].row
    assert last.end == "diverged"
    assert last.step < STEPS


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("adam", "no method 'adam'"),
        ("adamw:lr", "'lr' is no option=value"),
        ("adamw:rate=1", "adamw takes .*not rate"),
        ("adamw:dtype=int8", "dtype is one of bf16, autocast, fp32"),
        ("adamw:lr=0", "lr must be positive"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(bench: ModuleType, spec: str, reason: str) -> None:
    from convergence_recipes import Recipe

    with pytest.raises(ValueError, match=reason):
        Recipe.parse(spec)


def test_a_spectrum_keeps_the_norm_and_gains_are_trained(bench: ModuleType) -> None:
    from convergence_recipes import Place, Recipe
    from llama import Size

    place = Place(Size(64, 128, 2, 2, 512), LENGTH, torch.device("cpu"), compiler="aot_eager")
    plain = Recipe.parse("poetx:dtype=fp32").make(place).module.model.layers[0].mlp.gate_proj
    flat = Recipe.parse("poetx:dtype=fp32:spectrum=flat:gain=2:gains=rows").make(place).module.model.layers[0].mlp.gate_proj
    norm = torch.linalg.vector_norm(plain.weight)
    torch.testing.assert_close(torch.linalg.svdvals(flat.weight), (2 * norm / 8).expand(64))
    steep = Recipe.parse("poetx:dtype=fp32:spectrum=square").make(place).module.model.layers[0].mlp.gate_proj
    falling = ((torch.arange(64, 0, -1) - 0.5) / 64) ** 2
    torch.testing.assert_close(torch.linalg.svdvals(steep.weight), falling * norm / falling.norm(), atol=1e-5, rtol=1e-4)
    x = torch.ones(64)
    before = flat(x)
    flat.gain.data[0] = 3
    torch.testing.assert_close(flat(x)[0], 3 * before[0])
    flat(x).sum().backward()
    assert flat.gain.grad.count_nonzero()


def test_a_recipe_has_one_spelling(bench: ModuleType) -> None:
    from convergence_recipes import Recipe

    one, other = (Recipe.parse(text) for text in ("poetx:scale=2.0:lr=2e-3", "poetx:lr=0.002:scale=2.0"))
    assert str(one) == str(other) == "poetx:lr=0.002:scale=2.0"
    assert one.family == "poetx:scale=2.0"
    assert one.others == {"scale": 2.0}
    for text in ("poetx:scale=1", "poetx:block_size=256:gain=1", "poetx:lr=2e-3:floor=0.1:dtype=bf16"):
        assert str(Recipe.parse(text)) == "poetx:lr=0.002"
    assert str(Recipe.parse("adamw:gain=2")) == str(Recipe.parse("adamw:gain=2.0"))


def test_every_question_has_its_place_in_the_document(bench: ModuleType, tmp_path: Path) -> None:
    from convergence_rows import Key, Line, Row
    from convergence_suites import SUITES
    from convergence_table import NOTHING, write_all

    document = tmp_path / "convergence.md"
    document.write_text((BENCHMARKS.parent / "docs" / "convergence.md").read_text())
    moment = {"train_loss": 4.0, "lr": 1e-4, "seconds": 50.0, "tokens_per_s": 1e5, "peak_bytes": 10**10, "jobs": 3}
    lines = [
        Line(
            Key(size="60m", recipe="official:lr=0.001", seed=seed, steps=800, batch=128, seq=256),
            Row(
                step=800,
                tokens=26_214_400,
                epochs=0.32,
                val_loss=4 + seed / 10,
                end="finished",
                by_kind={"code": 3.0},
                **moment,
            ),
            {},
        )
        for seed in (0, 1)
    ]
    write_all(document, lines)
    text = document.read_text()
    assert "| 60m | 26.2 | 0.32 | `official:lr=0.001` | 4.050 ± 0.050 | 3.000 | 2 | 50 | 10.0 |" in text
    assert text.count(NOTHING) == len(SUITES) - 1
    assert all(suite.question in text for suite in SUITES.values())


def test_a_grid_multiplies_runs_and_asks_for_each_once(bench: ModuleType, corpus: Path) -> None:
    args = bench.parse(["--corpus", str(corpus), "--runs", "adamw,poetx,adamw", "--grid", "lr=1e-3,2e-3", "--seeds", "0,1"])
    assert [(key.recipe, key.seed) for key in args.keys] == [
        (f"{method}:lr={lr}", seed) for method in ("adamw", "poetx") for lr in (0.001, 0.002) for seed in (0, 1)
    ]
    core = bench.parse(["--corpus", str(corpus), "--suite", "core,rates"]).keys
    assert len({key.recipe for key in core}) == len(core)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to run: give --suite or --runs"),
        (["--suite", "speed"], "--suite takes core, .*not speed"),
        (["--runs", "adam"], "no method 'adam'"),
        (["--runs", "adamw", "--grid", "lr"], "'lr' is no option=value,value"),
    ],
)
def test_a_command_that_cannot_be_is_refused(
    bench: ModuleType, corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--corpus", str(corpus), *arguments])
    assert re.search(reason, capsys.readouterr().err)


OFFICIAL = """
import dataclasses
import os
import torch


@dataclasses.dataclass
class POETConfig:
    block_size: int
    merge_interval: int
    base_lr: float
    poet_lr: float


class POETModel(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.base_model = model

    def forward(self, **batch):
        return self.base_model(**batch)

    def merge_if_needed(self, step):
        with open(os.environ["MERGES"], "a") as file:
            file.write(f"{step} ")


def get_poet_optimizer(model, config):
    parameters = list(model.parameters())
    groups = [{"params": parameters[1:], "lr": config.base_lr}, {"params": parameters[:1], "lr": config.poet_lr}]
    return torch.optim.SGD(groups, lr=1.0)
"""
"""What we use of the authors' package, in its place."""


def test_the_authors_code_merges_after_each_step_and_has_its_rates(
    bench: ModuleType, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convergence_rows import read_csv

    (tmp_path / "authors" / "poet_torch").mkdir(parents=True)
    (tmp_path / "authors" / "poet_torch" / "__init__.py").write_text(OFFICIAL)
    monkeypatch.setenv("MERGES", str(tmp_path / "merges"))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    out = tmp_path / "result.csv"
    authors = ["--official", str(tmp_path / "authors"), "--jobs", "1"]
    run(bench, *command, *authors, "--runs", "official:lr=0.02:ratio=0.25:warmup=1", "--out", str(out))
    assert (tmp_path / "merges").read_text() == "1 2 3 4 "
    rows = [line.row for line in read_csv(out)]
    assert rows[-1].end == "finished"
    assert rows[1].lr == pytest.approx(0.02)


def test_a_terminated_command_ends_its_runs(corpus: Path, tmp_path: Path) -> None:
    child, note = tmp_path / "child.py", tmp_path / "pid"
    child.write_text(
        f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    options = [
        "--corpus",
        str(corpus),
        "--runs",
        "poetx",
        "--device",
        "cpu",
        "--jobs",
        "1",
        "--state",
        str(tmp_path / "state"),
    ]
    program = f"import convergence, pathlib\nconvergence.CHILD = pathlib.Path({str(child)!r})\nconvergence.main({options!r})"
    command = subprocess.Popen([sys.executable, "-c", program], cwd=BENCHMARKS)
    while not (note.exists() and note.read_text()):
        assert command.poll() is None
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.kill(int(note.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the run goes on")
