from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = [
    *("--device", "cpu", "--models", "tiny", "--batch", "2", "--seq", "16"),
    *("--steps", "2", "--block", "16", "--inner", "aot_eager"),
]

LAYER = 4 * 64 * 64 + 3 * 64 * 128  # numbers in the matrices of a decoder layer of ``tiny``
ORDINARY = 2 * 128 * 64 + 5 * 64  # embedding, head and norms
SKEWS = 4 * (4 + 4) * 120 + 3 * (4 + 8) * 120  # of a layer, in blocks of 16


@pytest.fixture
def ddp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ddp

    return ddp


@pytest.fixture
def rank(ddp: ModuleType) -> ModuleType:
    import ddp_rank

    return ddp_rank


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_measures_every_method_on_two_ranks(ddp: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "X.csv"
    ddp.main([*SMALL, "--methods", "poetx", "--ranks", "1,2", "--out", str(out)])
    ddp.main([*SMALL, "--methods", "adamw,fsdp2", "--ranks", "2", "--out", str(out), "--append"])
    rows = read(out)
    assert [(row["method"], row["ranks"]) for row in rows] == [
        ("poetx", "1"),
        ("poetx", "2"),
        ("adamw", "2"),
        ("fsdp2", "2"),
    ]
    assert not any(row["reason"] for row in rows)
    for row in rows:
        low, middle, high = (float(row[name]) for name in ("ms_q20", "ms_median", "ms_q80"))
        assert 0 < low <= middle <= high
        assert float(row["tokens_per_second"]) == pytest.approx(1e3 * 2 * 16 / middle)
        assert int(row["parameters"]) == 2 * LAYER + ORDINARY
        assert (row["torch"], row["peak_mib"], row["exposed_ms"]) == (torch.__version__, "", "")

    alone, poetx, adamw, fsdp = rows
    assert float(poetx["efficiency"]) == pytest.approx(float(poetx["tokens_per_second"]) / float(alone["tokens_per_second"]))
    assert (alone["efficiency"], adamw["efficiency"]) == ("1.0", "")
    weights = 2 * (2 * LAYER + ORDINARY)  # bytes
    assert [int(row["payload_bytes"]) for row in rows] == [
        0,
        4 * 2 * SKEWS + 2 * ORDINARY,
        weights,
        2 * weights + 2 * 2 * (LAYER + 2 * 64),
    ]
    for row in (poetx, adamw):  # two ranks in a ring send as much as they reduce
        assert (row["wire_bytes"], row["counted_by"]) == (row["payload_bytes"], "hook")
    assert (int(fsdp["wire_bytes"]), fsdp["counted_by"]) == (int(fsdp["payload_bytes"]) // 2, "arithmetic")
    assert out.with_suffix(".png").stat().st_size
    shown = capsys.readouterr().out
    assert f"{weights / (4 * 2 * SKEWS + 2 * ORDINARY):.2f}" in shown


def test_the_documents_table_is_what_was_measured(ddp: ModuleType) -> None:
    from ddp_table import markdown

    here = Path(ddp.__file__).parent
    table = markdown(ddp.read_csv(here / "results" / "ddp-h100.csv"))
    assert table in (here.parent / "docs" / "distributed.md").read_text()


def test_a_failed_case_is_a_row_and_an_error(ddp: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "X.csv"
    with pytest.raises(SystemExit, match="1 of 1 cases failed"):
        ddp.main([*SMALL, "--methods", "poetx", "--ranks", "1", "--block", "1", "--out", str(out)])
    (row,) = read(out)
    assert "block_size 1 is impossible" in row["reason"]
    assert row["ms_median"] == ""


def test_a_case_that_hangs_is_given_up(ddp: ModuleType) -> None:
    (case,) = ddp.cases(ddp.parse([*SMALL, "--methods", "adamw", "--ranks", "1"]))
    assert ddp.run(case, "cpu", 0.5).reason == "not done in 0 seconds"


def test_rows_survive_the_csv(ddp: ModuleType, tmp_path: Path) -> None:
    import ddp_rows

    asked = list(ddp.cases(ddp.parse(["--compress", "none,bf16", "--no-split"])))
    assert len({row.case for row in asked}) == len(asked) == 2 * (3 + 2 + 2)
    assert {row.compress for row in asked if row.method != "poetx" or row.ranks == 1} == {"none"}
    facts = dict.fromkeys(ddp_rows.FACTS, "here")
    rows = [ddp.Row(**{**json.loads(json.dumps(vars(row))), "facts": facts, "ms_median": 1.5}) for row in asked]
    ddp.write_csv(tmp_path / "X.csv", rows)
    assert ddp.read_csv(tmp_path / "X.csv") == rows


@pytest.fixture
def process_group() -> Iterator[None]:
    """A world of this process alone. A wrapper that outlives it may wait for ever for the thread that runs its hook."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("hook", "bytes_each"), [("allreduce_hook", 4), ("bf16_compress_hook", 2)])
def test_buckets_are_counted_as_they_are_sent(rank: ModuleType, hook: str, bytes_each: int) -> None:
    module = DistributedDataParallel(nn.Linear(30, 7))
    sent = rank.count_buckets(module, getattr(rank, hook))
    module(torch.ones(2, 30)).sum().backward()
    assert sum(sent) == bytes_each * (30 * 7 + 7)


@pytest.mark.parametrize(
    ("ours", "others", "lengths"),
    [
        ([(0, 4)], [], (4, 4)),
        ([(0, 4), (2, 6)], [(5, 9)], (6, 5)),
        ([(0, 4), (10, 12)], [(1, 2), (1, 3), (11, 20)], (6, 3)),
        ([], [(0, 1)], (0, 0)),
    ],
)
def test_time_of_communication_alone(
    rank: ModuleType, ours: list[tuple[int, int]], others: list[tuple[int, int]], lengths: tuple[int, int]
) -> None:
    assert rank.intervals_alone(ours, others) == lengths


@pytest.mark.gpu
def test_measures_memory_and_communication_on_gpus(ddp: ModuleType, tmp_path: Path) -> None:
    ranks, out = min(2, torch.cuda.device_count()), tmp_path / "X.csv"
    ddp.main([*SMALL, "--device", "cuda", "--ranks", str(ranks), "--out", str(out)])
    for row in read(out):
        assert float(row["peak_mib"]) > 0
        if ranks > 1:
            assert float(row["communication_ms"]) >= float(row["exposed_ms"]) > 0
