"""The device and the versions that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

_PACKAGES = ("triton", "transformers")


def facts(device: torch.device | str, *packages: str) -> dict[str, str | None]:
    """Name of the device, and versions, by flat names that a CSV takes; None for what is not there.

    Args:
        device: on a GPU, its name and driver are told; it is made the process's, as by any call of CUDA.
        packages: more of them whose versions count.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: version(package) for package in (*_PACKAGES, *packages)},
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "poetx_compile": version("poetx-compile"),
    }


def version(package: str) -> str | None:
    """The installed version, or None."""
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
