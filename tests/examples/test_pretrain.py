from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
STOPPED_AT = 5


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, with a size for tests, and a line of metrics for each step."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import pretrain

    monkeypatch.setitem(
        pretrain.SIZES, "test", pretrain.Size(32, 48, 2, 2, 2, steps=STEPS, batch=2, seq=16, lr=1e-2, block_size=16)
    )
    monkeypatch.setattr(pretrain, "LOG_EVERY", 1)
    monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 4)
    return pretrain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    for number in range(5):
        path = root / str(number % 2) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"File {number} says the same again. " * 20)
    return root


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    return ["--config", "test", "--corpus", str(folder), "--inner", "aot_eager", "--eval-every", "2", "--device", "cpu"]


def test_resumed_run_ends_with_the_same_bits(
    pretrain: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pretrain.main([*arguments, "--out", str(whole)])

    batch = pretrain.Corpus.batch

    def interrupted(corpus: object, seed: int, step: int, size: int, length: int) -> torch.Tensor:
        if step == STOPPED_AT:
            raise KeyboardInterrupt
        return batch(corpus, seed, step, size, length)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Corpus, "batch", interrupted)
        pretrain.main([*arguments, "--out", str(resumed)])
    assert torch.load(resumed / "poetx.pt")["rows"][-1][1] == 4
    pretrain.main([*arguments, "--out", str(resumed), "--resume"])

    expected, found = torch.load(whole / "poetx.pt"), torch.load(resumed / "poetx.pt")
    assert expected["model"].keys() == found["model"].keys()
    assert all(torch.equal(expected["model"][name], found["model"][name]) for name in expected["model"])
    assert [row[:5] for row in expected["rows"]] == [row[:5] for row in found["rows"]]

    with pytest.raises(SystemExit, match="trained with seed 0, and cannot be resumed with seed 1"):
        pretrain.main([*arguments, "--out", str(resumed), "--resume", "--seed", "1"])


def test_comparison_starts_equal_and_leaves_its_files(
    pretrain: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main([*arguments, "--out", str(tmp_path), "--compare", "skewmuon,adamw"])

    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["poetx"] * STEPS + ["skewmuon"] * STEPS + ["adamw"] * STEPS
    for start in (STEPS, 2 * STEPS):
        assert float(rows[0]["train_loss"]) == pytest.approx(float(rows[start]["train_loss"]), rel=1e-5)
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "4", "6"] * 3
    assert float(rows[STEPS - 1]["val_loss"]) < float(rows[1]["val_loss"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"]["steps"] == STEPS
    assert run["results"].keys() == {"poetx", "skewmuon", "adamw"}
    for method in ("poetx", "skewmuon", "adamw"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method).state_dict()
        saved = torch.load(tmp_path / f"{method}.pt")["model"]
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert "rotation: gram" in capsys.readouterr().out

    pretrain.main([*arguments, "--out", str(tmp_path), "--compare", "skewmuon,adamw", "--resume"])
    assert capsys.readouterr().out.count("finished before") == 3


def test_watching_leaves_a_table_and_a_picture_that_a_resumed_run_goes_on_with(
    pretrain: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = pretrain.Watch.note

    def note_until_stopped(watch: object, step: int, **settings: bool) -> None:
        if step == STOPPED_AT:
            raise KeyboardInterrupt
        note(watch, step, **settings)

    command = [*arguments, "--out", str(tmp_path), "--watch"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Watch, "note", note_until_stopped)
        pretrain.main(command)
    pretrain.main([*command, "--resume"])
    with (tmp_path / "rotations.csv").open(newline="") as file:
        points = {(int(line["step"]), line["metric"]): float(line["value"]) for line in csv.DictReader(file)}
    name = "model.layers.1.mlp.up_proj.weight"
    for step in range(1, STEPS + 1):
        assert 1e-4 < points[step, f"angle/{name}"] < 1
        assert 0 <= points[step, f"orthogonality/{name}"] < 1e-5
        assert points[step, "retraction_seconds"] > 0
    drifts = {step: value for (step, metric), value in points.items() if metric == f"spectrum_drift/{name}"}
    assert drifts.keys() == {1, 2, 4, 5, 6} and drifts[1] == drifts[5] == 0 and max(drifts.values()) < 1e-5
    assert (tmp_path / "rotations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--corpus", "nowhere"], "the corpus folder nowhere does not exist"),
        (["--seq", "100000"], "longer than the corpus"),
        (["--resume"], "--resume finds no checkpoint in"),
    ],
)
def test_says_what_is_wrong(
    pretrain: ModuleType, arguments: list[str], tmp_path: Path, extra: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        pretrain.main([*arguments, "--out", str(tmp_path / "out"), *extra])
    assert not (tmp_path / "out").exists()


def test_corpus_holds_whole_files_out(pretrain: ModuleType, folder: Path) -> None:
    (folder / "picture.bin").write_bytes(b"\x89\0\1")
    corpus = pretrain.Corpus(folder)
    parts = [bytes(part.tolist()).strip(b"\0").split(b"\0") for part in (corpus.train, corpus.validation)]
    assert len(parts[0]) + len(parts[1]) == 5
    assert not set(parts[0]) & set(parts[1])
    assert torch.equal(corpus.batch(1, 7, 4, 32), pretrain.Corpus(folder).batch(1, 7, 4, 32))
    assert not torch.equal(corpus.batch(1, 7, 4, 32), corpus.batch(1, 8, 4, 32))


def test_corpus_needs_text(pretrain: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "picture.bin").write_bytes(b"\x89\0\1")
    with pytest.raises(ValueError, match="has 0 text files; it takes two at least"):
        pretrain.Corpus(tmp_path)
