"""``python -m poetx_compile``: commands beside a training script."""

from __future__ import annotations

import argparse
import sys

from . import bench, doctor, forecast
from .config import INNER, SKEW_DTYPES, STORAGES, PoetxConfig
from .errors import PoetxError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m poetx_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="check versions, device and registration, and verify one training step")
    check.add_argument("--inner", choices=INNER, default="inductor", help="aot_eager needs no C++ compiler")
    measure = commands.add_parser("bench", help="measure the kernels on this machine")
    measure.add_argument("what", choices=["tune"], help="tune: find the fastest tiles for this GPU (minutes), and keep them")
    ahead = commands.add_parser("plan", help="estimate the memory of a training step, without a GPU and without allocating")
    ahead.add_argument("--model", required=True, help="config.json, its folder, or llama:hidden=4096,layers=32,heads=32,...")
    ahead.add_argument(
        "--gpu", help="memory of the card, such as 24GB, 80GiB or 24 (GB): also says what fits, by the exit status too"
    )
    ahead.add_argument("--seq", type=int, required=True, help="tokens of a sequence")
    ahead.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch")
    ahead.add_argument("--dtype", choices=forecast.DTYPES, default="bfloat16", help="of the weights")
    ahead.add_argument("--block-size", type=int, default=PoetxConfig.block_size)
    ahead.add_argument(
        "--storage",
        choices=(*STORAGES, "auto"),
        default="auto",
        help="auto: folded, and with --gpu what options={'memory': 'auto'} would take there",
    )
    ahead.add_argument("--skew-dtype", choices=SKEW_DTYPES)
    ahead.add_argument("--activation-memory-budget", type=float, metavar="SHARE")
    ahead.add_argument("--checkpointing", action="store_true", help="with the model's own gradient_checkpointing_enable()")
    ahead.add_argument("--ordinary", action="store_true", help="estimate torch.compile with AdamW beside it")
    ahead.add_argument(
        "--fused", action="store_true", help="with AdamW(fused=True), which needs no memory beside its states"
    )
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    try:
        if command == "doctor":
            return 0 if doctor.run(arguments["inner"]) else 1
        if command == "plan":
            return 0 if forecast.run(**arguments) else 1
        bench.tune()
    except PoetxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
