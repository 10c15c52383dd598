"""``python -m poetx_compile``: commands beside a training script."""

from __future__ import annotations

import argparse
import sys

from . import doctor
from .config import INNER


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m poetx_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="check versions, device and registration, and verify one training step")
    check.add_argument("--inner", choices=INNER, default="inductor", help="aot_eager needs no C++ compiler")
    arguments = parser.parse_args()
    return 0 if doctor.run(arguments.inner) else 1


if __name__ == "__main__":
    sys.exit(main())
