"""``python -m poetx_compile``: commands beside a training script."""

from __future__ import annotations

import argparse
import sys

from . import bench, doctor
from .config import INNER
from .errors import PoetxError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m poetx_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="check versions, device and registration, and verify one training step")
    check.add_argument("--inner", choices=INNER, default="inductor", help="aot_eager needs no C++ compiler")
    measure = commands.add_parser("bench", help="measure the kernels on this machine")
    measure.add_argument("what", choices=["tune"], help="tune: find the fastest tiles for this GPU (minutes), and keep them")
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        return 0 if doctor.run(arguments.inner) else 1
    try:
        bench.tune()
    except PoetxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
