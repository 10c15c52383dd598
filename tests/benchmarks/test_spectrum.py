from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn, randn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def spectrum(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import spectrum

    yield spectrum
    sys.modules.pop("spectrum", None)


def test_fewer_bits_drift_more(spectrum: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "drift.csv"
    spectrum.main(["--device", "cpu", "--shape", "48x33", "--block", "32", "--steps", "30", "--out", str(out)])
    rows, machine = spectrum.plot_spectrum.read_csv(out)
    assert machine["shape"] == "48x33"
    assert out.with_suffix(".png").stat().st_size > 10_000
    steps = sorted({row.step for row in rows})
    assert steps[0] == 1
    assert steps[-1] == 30
    last = {row.label: row for row in rows if row.step == 30}
    assert len(last) == 7
    for name in ("distance", "spectrum_drift", "spectrum_drift_rms"):
        for dtype in ("bfloat16", "float16"):
            eight, four, none = (getattr(last[f"{dtype}, {bits} bits"], name) for bits in (8, 4, 0))
            assert getattr(last["float32"], name) < eight < four < none
    assert last["float32"].distance < 2e-6


def test_a_lean_weight_is_rounded_once_for_each_base(spectrum: ModuleType, tmp_path: Path) -> None:
    command = [
        "--device",
        "cpu",
        "--shape",
        "48x32",
        "--block",
        "24",
        "--steps",
        "30",
        "--dtypes",
        "bfloat16",
        "--bits",
        "8",
    ]
    distances = {}
    for period in ("0", "5"):
        out = tmp_path / f"{period}.csv"
        spectrum.main([*command, "--storages", "int8,bf16-lean", "--period", period, "--out", str(out)])
        rows, machine = spectrum.plot_spectrum.read_csv(out)
        assert machine["period"] == period
        distances[period] = {(row.label, row.step): row.distance for row in rows}
    still, redrawn = distances["0"], distances["5"]
    assert still["bfloat16, bf16-lean", 30] < 1e-5, "its base holds the very weight"
    for storage in ("int8", "bf16-lean"):
        label = f"bfloat16, {storage}"
        assert still[label, 30] == pytest.approx(still[label, 1], rel=1e-2, abs=1e-5), "the noise of a base does not add up"
        assert redrawn[label, 30] > 1.5 * still[label, 30]


def test_every_weight_turns_by_the_angle_that_was_asked(spectrum: ModuleType) -> None:
    weight = nn.Parameter(randn(64, 64))
    factor = spectrum.OrthogonalFactor(weight, "w", spectrum.PoetxConfig(block_size=32))
    factor.q.data.normal_().mul_(spectrum.skew_size(factor, 0.01))
    before = weight.detach().clone()
    spectrum.retract_all([(factor, 1.0)])
    moved = ((weight - before).norm() / before.norm()).item()
    assert moved == pytest.approx(0.01 * 2**0.5, rel=0.1)  # both sides


def test_an_unknown_dtype_is_refused(spectrum: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        spectrum.parse(["--dtypes", "bf16"])
    assert "--dtypes takes float32, bfloat16, float16, not bf16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        spectrum.parse(["--storages", "folded"])
    assert "--storages takes int8, bf16-lean, not folded" in capsys.readouterr().err
