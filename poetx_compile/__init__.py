"""poetx-compile: train any PyTorch model by orthogonal rotations of its weights, as a ``torch.compile`` backend."""

from . import optim
from .api import prepare, report, restore
from .config import PoetxConfig
from .distributed import check_ranks, watch_ranks
from .errors import PoetxError, PoetxWarning
from .metrics import Metrics
from .report import Report

__all__ = [
    "Metrics",
    "PoetxConfig",
    "PoetxError",
    "PoetxWarning",
    "Report",
    "check_ranks",
    "optim",
    "prepare",
    "report",
    "restore",
    "watch_ranks",
]
