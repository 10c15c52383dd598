from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

METHODS = ("poetx", "poetx, even steps", "poetx with AdamW on q, even steps")

OFFICIAL = """
import torch


class POETLinear(torch.nn.Module):
    def __init__(self, in_features, out_features, block_size, bias, dtype, mem_efficient_mode):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.oft_R = torch.nn.Parameter(torch.zeros(in_features // block_size, 3, dtype=dtype))
        self.mem_efficient_mode = mem_efficient_mode

    def forward(self, x):
        batch, tokens, features = x.shape
        if self.mem_efficient_mode:
            raise NotImplementedError("not\\nhere")
        return x @ self.weight.t() * (1 + self.oft_R.sum())

    @torch.no_grad()
    def merge_then_reinitialize(self):
        assert self.oft_R.count_nonzero(), "nothing to merge"
        self.oft_R.zero_()


class POETAdamW(torch.optim.AdamW):
    pass
"""
"""What we use of the authors' package, in its place."""


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import layer

    yield layer
    sys.modules.pop("poet_torch", None)


def run(layer: ModuleType, out: Path, *extra: str) -> list[dict[str, str]]:
    small = ["--device", "cpu", "--shapes", "64x96", "--tokens", "32", "--blocks", "16,32", "--out", str(out)]
    layer.main([*small, *extra])
    return read(out)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_measures_every_method_at_every_point(layer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(layer, tmp_path / "X.csv", "--tokens", "32,64")

    updates = [("update", "", method, block) for block in ("16", "32") for method in METHODS]
    layers = [
        ("forward+backward", tokens, method, block)
        for tokens in ("32", "64")
        for method, block in (("linear", ""), ("poetx", "16"), ("poetx", "32"))
    ]
    found = [(row["what"], row["tokens"], row["method"], row["block"]) for row in rows]
    assert found == [("update", "", "adamw", ""), *updates, *layers]
    for row in rows:
        baseline = {"update": "adamw", "forward+backward": "linear"}[row["what"]]
        base = next(
            other
            for other in rows
            if (other["method"], other["tokens"], other["what"]) == (baseline, row["tokens"], row["what"])
        )
        low, middle, high = (float(row[name]) for name in ("ms_q20", "ms_median", "ms_q80"))
        assert 0 < low <= middle <= high
        assert isfinite(high)
        assert float(row["ratio_to_baseline"]) == pytest.approx(middle / float(base["ms_median"]))
        assert (row["m"], row["n"], row["timed_by"], row["reason"], row["floor_ms"]) == ("64", "96", "clock", "", "")
        assert (row["torch"], row["cuda"], row["driver"]) == (torch.__version__, torch.version.cuda or "", "")
        assert row["device"].endswith("CPU")
        assert datetime.fromisoformat(row["date"]).tzinfo
    for ending in ("ratio", "update"):
        assert (tmp_path / f"X-{ending}.png").read_bytes().startswith(b"\x89PNG")
    assert "time over that of linear" in capsys.readouterr().out


def test_writes_the_floors_of_given_peaks(layer: ModuleType, tmp_path: Path) -> None:
    """By hand, for 12 flop/ns and 1 byte/ns: 16 x 16 blocks, 4 on each side, 8 * 120 skew parameters."""
    rows = run(layer, tmp_path / "X.csv", "--shapes", "64x64", "--peak-flops", "12e9", "--peak-bandwidth", "1e9")
    found = {(row["what"], row["method"], row["block"]): row for row in rows}

    def check(what: str, method: str, block: str, flops: int, moved: int, nanoseconds: float) -> None:
        row = found[what, method, block]
        assert (int(row["flops"]), int(row["bytes"])) == (flops, moved)
        assert float(row["floor_ms"]) == pytest.approx(nanoseconds / 1e6)

    product, gram = 262144, 8192  # 2 * 32 * 64 * 64 flops outweigh 16384 bytes; 4 * 32 * 64 bytes outweigh 65536 flops
    check("forward+backward", "linear", "", 3 * product, 3 * 16384, 3 * product / 12)
    check("forward+backward", "poetx", "16", 2 * product + 2 * 65536, 2 * 16384 + 2 * gram, 2 * product / 12 + 2 * gram)

    turn, cayley = 262144, 196608  # 4 * 64 * 64 * 16 flops, which 6 bytes a weight outweigh; 8 * 3 * 2 * 16 ** 3
    check("update", "adamw", "", 0, 14 * 4096, 14 * 4096)
    check("update", "poetx", "16", turn + cayley, 6 * 4096 + 4 * 960, 6 * 4096 + cayley / 12)
    even = 294912  # half of 9 products of 8 blocks, 2 * 16 ** 3 flops each; their 8 * 960 bytes take less
    check("update", "poetx, even steps", "16", even + turn + cayley, 6 * 4096 + 12 * 960, 6 * 4096 + (even + cayley) / 12)
    whole = 6 * 4096 + (even + cayley) / 12 + 28 * 960
    check("update", "poetx with AdamW on q, even steps", "16", even + turn + cayley, 6 * 4096 + 40 * 960, whole)


def test_knows_the_peaks_of_an_h100(layer: ModuleType) -> None:
    peaks = layer.floors.PEAKS["NVIDIA H100 80GB HBM3"]
    assert (peaks.flops, peaks.bandwidth) == (989e12, 3.35e12)
    linear = layer.floors.floor_ms(layer.floors.linear(4096, 4096, 2048), peaks)
    assert linear == pytest.approx(0.2085, abs=1e-4)  # 3 * 2 * 2048 * 4096 ** 2 flops
    assert layer.floors.floor_ms(layer.floors.linear(4096, 4096, 2048), None) is None


def test_draws_again_from_the_csv(layer: ModuleType, tmp_path: Path) -> None:
    run(layer, tmp_path / "X.csv", "--peak-flops", "1e12", "--peak-bandwidth", "1e9")
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    pictures = layer.plot_layer.draw(tmp_path / "X.csv")
    assert pictures == [tmp_path / "X-ratio.png", tmp_path / "X-update.png"]
    assert all(picture.stat().st_size for picture in pictures)


def test_official_rows_stand_beside_ours_and_say_what_failed(
    layer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "poet_torch.py").write_text(OFFICIAL)
    rows = run(layer, tmp_path / "X.csv", "--blocks", "16", "--official", str(tmp_path / "checkout"))

    official = {row["method"]: row for row in rows if row["method"].startswith("official")}
    assert official.keys() == {"official-fast", "official-mem", "official-adamw", "official-merge"}
    failed = official.pop("official-mem")
    assert (failed["reason"], failed["ms_median"]) == ("NotImplementedError: not here", "")
    assert all(float(row["ms_median"]) > 0 and not row["reason"] for row in official.values())
    assert all(row["ms_median"] for row in rows if row not in (failed, *official.values()))
    assert "official-mem, 16: NotImplementedError: not here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "minutes", "reason"),
    [
        ("import no_such_package", "5", "No module named 'no_such_package'"),
        (OFFICIAL, "0", "--official-minutes were used up"),
    ],
)
def test_official_code_that_cannot_be_used_is_told_once(
    layer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, minutes: str, reason: str
) -> None:
    (tmp_path / "poet_torch.py").write_text(source)
    extra = ["--blocks", "16", "--official", str(tmp_path), "--official-minutes", minutes]
    rows = run(layer, tmp_path / "X.csv", *extra)
    official = [row for row in rows if row["method"].startswith("official")]
    assert len(official) == 4
    assert all(reason in row["reason"] for row in official)
    assert capsys.readouterr().out.count(reason) == 1


def test_a_failure_of_ours_is_a_row_and_an_error(layer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ValueError("no such tiles")

    monkeypatch.setattr(layer.methods, "poetx", broken)
    with pytest.raises(SystemExit, match="2 of our own rows failed"):
        run(layer, tmp_path / "X.csv")
    rows = read(tmp_path / "X.csv")
    assert [row["reason"] for row in rows if row["reason"]] == ["ValueError: no such tiles"] * 2
    assert all(bool(row["ms_median"]) != bool(row["reason"]) for row in rows)


def test_quick_is_a_smaller_grid_and_filters_replace_either(layer: ModuleType) -> None:
    whole, quick = layer.parse([]), layer.parse(["--quick"])
    assert set(quick.shapes) < set(whole.shapes) and set(quick.tokens) < set(whole.tokens)
    assert quick.blocks == [256]
    assert whole.official_tokens == quick.tokens
    filtered = layer.parse(["--quick", "--tokens", "1,2", "--shapes", "8x16"])
    assert (filtered.tokens, filtered.shapes, filtered.blocks) == ([1, 2], [(8, 16)], [256])
    assert filtered.official_tokens == [1, 2]


def test_the_rotated_layer_is_the_ordinary_one(layer: ModuleType) -> None:
    """Both methods of a point must compute the same: same output, same gradient of the input."""
    gradients = []
    for build, extra in ((layer.methods.linear, ()), (layer.methods.poetx, (16,))):
        source = layer.Source(torch.device("cpu"))
        x, g = source.normal(8, 32).requires_grad_(), source.normal(8, 64)
        work = build(source, 64, 32, x, g, *extra)
        work.run()
        gradients.append(x.grad)
        work.before()
        assert x.grad is None
    torch.testing.assert_close(*gradients)


def test_updates_do_what_they_say(layer: ModuleType) -> None:
    source = layer.Source(torch.device("cpu"))
    work = layer.methods.retract(source, 64, 64, 2, 16)
    before = [weight.detach().clone() for weight in work.alive]
    work.before()
    work.run()
    assert all(not torch.equal(weight, old) for weight, old in zip(work.alive, before))
    after = [weight.detach().clone() for weight in work.alive]
    work.run()  # q is zero now
    assert all(torch.equal(weight, old) for weight, old in zip(work.alive, after))

    work = layer.methods.step_and_retract(source, 64, 64, 2, 16)
    before = [weight.detach().clone() for weight in work.alive]
    work.run()
    assert all(not torch.equal(weight, old) for weight, old in zip(work.alive, before))
    assert (layer.methods.weights_at_once(4096, 4096), layer.methods.weights_at_once(14336, 4096)) == (8, 4)


def test_an_update_is_told_by_the_weight(layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "side_by_side", lambda watches: [layer.Timing(8.0, 4.0, 12.0) for _ in watches])
    case = layer.Case("adamw", None, lambda: layer.Work(list, list), layer.floors.adamw(64))
    (row,) = layer.measure(layer.Point(8, 8, None, count=4), [case], torch.device("cpu"), None)
    assert (row.ms_median, row.ms_q20, row.ms_q80, row.ratio_to_baseline) == (2.0, 1.0, 3.0, 1.0)


class Watch:
    """Says that its work took ``ms`` times 1, 2, 3, ... and notes its turns."""

    timed_by = "clock"

    def __init__(self, name: str, ms: float, turns: list[str]) -> None:
        self.name, self.ms, self.turns, self.calls = name, ms, turns, 0

    def __call__(self) -> float:
        self.turns.append(self.name)
        self.calls += 1
        return self.ms * self.calls


def test_times_in_turns_for_as_long_as_it_must(layer: ModuleType) -> None:
    turns: list[str] = []
    timings = layer.side_by_side([Watch("a", 0.5, turns), Watch("b", 10, turns), Watch("c", 1000, turns)])
    assert turns[:9] == ["a", "b", "c"] * 3
    assert [turns.count(name) - 1 for name in "abc"] == [30, 20, 10]
    assert timings[2].median == 1000 * (2 + 11) / 2
    assert timings[2].q20 == pytest.approx(1000 * (2 + 0.2 * 9))
    assert timings[2].q80 == pytest.approx(1000 * (2 + 0.8 * 9))


@pytest.mark.gpu
def test_graphs_where_possible_and_events_elsewhere(layer: ModuleType, tmp_path: Path) -> None:
    device = torch.device("cuda")
    matrix = torch.randn(512, 512, device=device)
    waits = layer.Work(lambda: (matrix @ matrix).sum().item(), lambda: None)
    watches = [layer.stopwatch(work, device) for work in (waits, layer.Work(lambda: matrix @ matrix, lambda: None))]
    assert [watch.timed_by for watch in watches] == ["events", "graph"]
    assert all(0 < timing.q20 <= timing.median for timing in layer.side_by_side(watches))
    mebibytes = layer.peak_mib(layer.Work(lambda: torch.empty(4 << 20, dtype=torch.int8, device=device), lambda: None))
    assert mebibytes == 4

    layer.main(["--shapes", "256x512", "--tokens", "128", "--blocks", "64", "--out", str(tmp_path / "X.csv")])
    rows = read(tmp_path / "X.csv")
    assert {row["timed_by"] for row in rows} == {"graph"}
    assert [bool(row["peak_mib"]) for row in rows] == [row["what"] == "forward+backward" for row in rows]


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("layer-*.csv")), ids=lambda path: path.stem)
def test_what_was_measured_can_be_drawn_again(layer: ModuleType, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert all(picture.exists() for picture in layer.plot_layer.draw(copy))
