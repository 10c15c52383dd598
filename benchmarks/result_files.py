"""What every result stands beside: the device, the versions and the date."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def facts(device: torch.device, *packages: str) -> dict[str, str | None]:
    """The device and the versions that a result belongs to, those of ``packages`` among them."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "poetx_compile": _version("poetx-compile"),
        **{package: _version(package) for package in packages},
    }


def write_csv(path: Path, rows: Sequence[Any], machine: Mapping[str, str | None]) -> None:
    """Write dataclasses of one kind, each with what is true of the machine, and replace the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in dataclasses.fields(rows[0])), *machine])
        writer.writerows([*dataclasses.astuple(row), *machine.values()] for row in rows)
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.split("\n")
    return lines[0].strip() if not done.returncode and lines[0] else None
