from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("recipe", "keeps"), [("poetx:lr=1e-2", True), ("muon:lr=1e-1:dtype=fp32", False)])
def test_rotations_keep_spectra_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, keeps: bool
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rows
    import trained_spectrum

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    tokens = np.random.default_rng(0).integers(512, size=600).astype("<u2")
    for name in ("train", "val"):
        tokens.tofile(corpus / f"{name}.bin")
    segments = [{"source": "prose", "kind": "prose", "start": 0, "end": 600}]
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 512, "val_segments": segments}))
    out = tmp_path / "result.csv"
    little = ["--size", "tiny", "--steps", "4", "--batch", "4", "--seq", "16", "--device", "cpu", "--compiler", "aot_eager"]
    trained_spectrum.main(["--corpus", str(corpus), "--run", f"{recipe}:warmup=1", *little, "--out", str(out)])
    found = [row for row, _ in rows.read_csv(out, trained_spectrum.Row)]
    assert len(found) == 2 * 7
    shapes = ("largest", "upper", "middle", "lower")
    changes = [abs(getattr(row, name) - getattr(row, f"{name}_before")) for row in found for name in shapes]
    assert (max(changes) < 1e-3) == keeps
    assert all(abs(row.growth - 1) < 1e-3 for row in found) == keeps
