"""Training speed and bytes on the wire on several GPUs of one host: poetx and AdamW through DDP, and AdamW through FSDP2.

    python benchmarks/ddp.py                          # on two GPUs: Llama 1B and 3B, every method on one and on two
    python benchmarks/ddp.py --models 1b --append     # one model; keep the other rows of the CSV
    python benchmarks/ddp.py --device cpu --models tiny --batch 2 --seq 32 --inner aot_eager    # by gloo

Each case runs by torchrun in processes of its own. README.md beside this file says how it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import plot_ddp
from ddp_rows import Row, fewer_bytes, read_csv, with_efficiency, write_csv
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
METHODS = ("poetx", "adamw", "fsdp2")


def cases(args: argparse.Namespace) -> Iterator[Row]:
    for model in args.models:
        for method in args.methods:
            hooks = args.compress if method == "poetx" else ["none"]
            for ranks in args.ranks:
                travels = itertools.product(hooks, args.nccl_ctas) if ranks > 1 else [("none", 0)]
                for compress, ctas in travels:
                    yield Row(
                        model=model,
                        method=method,
                        compress=compress,
                        compiled="layers" if method == "fsdp2" else args.compile,
                        inner=args.inner,
                        split=args.split,
                        bucket_mb=args.bucket_mb,
                        ctas=ctas,
                        ranks=ranks,
                        batch=args.batch,
                        seq=args.seq,
                        block=args.block if method == "poetx" else None,
                        skew_dtype=args.skew_dtype if method == "poetx" else "",
                        updates=args.updates if method == "poetx" else "",
                        steps=args.steps,
                    )


def run(case: Row, device: str, seconds: float) -> Row:
    """A case by torchrun, with its numbers, or with the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command = [*launch, str(HERE / "ddp_rank.py"), device, json.dumps(dataclasses.asdict(case)), str(out)]
        with subprocess.Popen(
            command, env=_environment(case.ctas), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                _, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks, which hold the pipe and the GPUs too
                process.communicate()
                return dataclasses.replace(case, reason=f"not done in {seconds:.0f} seconds")
        if out.exists():
            return Row(**json.loads(out.read_text()))
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        return dataclasses.replace(case, reason=" ".join([f"exit code {process.returncode}:", *last])[:300])


def _environment(ctas: int) -> dict[str, str]:
    paths = [str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    fixed = {"NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    limit = {"NCCL_MAX_CTAS": str(ctas)} if ctas else {}
    return {"OMP_NUM_THREADS": "1", **os.environ, **fixed, **limit}


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Several GPUs", title_justify="left")
    names = ("model", "method", "GPUs", "ms", "tokens/s a GPU", "efficiency", "MB a step", "AdamW's / these")
    for name in (*names, "NCCL ms (alone)", "peak GiB", "compiled, s"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        if row.ms_median is None:
            table.add_row(row.model, row.described, str(row.ranks), row.reason[:60])
            continue
        less = fewer_bytes(row, rows)
        table.add_row(
            row.model,
            row.described,
            str(row.ranks),
            f"{row.ms_median:.1f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.efficiency:.3f}" if row.efficiency else "",
            f"{row.payload_bytes / 1e6:.1f}" if row.payload_bytes else "",
            f"{less:.2f}" if less else "",
            f"{row.communication_ms:.1f} ({row.exposed_ms:.1f})" if row.communication_ms else "",
            f"{row.peak_mib / 1024:.1f}" if row.peak_mib else "",
            f"{row.compile_seconds:.0f}",
        )
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", type=names, default=["1b", "3b"], metavar="tiny,1b,3b")
    parser.add_argument("--methods", type=names, default=list(METHODS), metavar=",".join(METHODS))
    parser.add_argument(
        "--compress", type=names, default=["none"], metavar="none,bf16", help="of q's gradients, by torch's hook"
    )
    parser.add_argument("--ranks", type=numbers, default=[1, 2], metavar="1,2")
    parser.add_argument("--batch", type=int, default=4, help="sequences on each GPU")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in each")
    parser.add_argument("--steps", type=int, default=15, help="timed, after the warm-up")
    parser.add_argument("--block", type=int, default=256, help="poetx's block_size")
    parser.add_argument("--skew-dtype", choices=("float32", "bfloat16"), default="float32", help="poetx's skew_dtype")
    parser.add_argument("--updates", choices=("orthogonal", "given"), default="orthogonal", help="poetx's updates")
    parser.add_argument("--compile", choices=("model", "layers"), default="model", help="fsdp2: always its layers")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor", help="what compiles")
    parser.add_argument("--bucket-mb", type=int, default=25, help="DistributedDataParallel's bucket_cap_mb")
    parser.add_argument("--nccl-ctas", type=numbers, default=[0], metavar="0,4", help="NCCL_MAX_CTAS; 0 leaves it to NCCL")
    parser.add_argument("--no-split", dest="split", action="store_false", help="torch._dynamo.config.optimize_ddp = False")
    parser.add_argument("--minutes", type=float, default=9.0, help="that one case may take")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ddp-<device>.csv")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases in the CSV")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be 2 or more: quantiles need them")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rows = read_csv(args.out) if args.append and args.out and args.out.exists() else []
    done: list[Row] = []
    for case in cases(args):
        print(f"{case.model}, {case.described}, {case.ranks} rank(s)", flush=True)
        row = run(case, args.device, 60 * args.minutes)
        if row.reason:
            print(f"  {row.reason}", flush=True)
        done.append(row)
        args.out = args.out or HERE / "results" / f"ddp-{_slug(row)}.csv"
        kept = read_csv(args.out) if args.append and not rows and args.out.exists() else rows
        rows = with_efficiency([*(other for other in kept if other.case != row.case), row])
        write_csv(args.out, rows)
    picture = plot_ddp.draw(args.out)
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    print("\n".join(map(str, (args.out, picture))))
    if failed := [row for row in done if row.reason]:
        raise SystemExit(f"{len(failed)} of {len(done)} cases failed; column 'reason' of {args.out} says why")


def _slug(row: Row) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (row.facts.get("device") or "unknown").lower())


if __name__ == "__main__":
    main()
