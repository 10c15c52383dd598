"""poetx-compile: train any PyTorch model by orthogonal rotations of its weights, as a ``torch.compile`` backend."""

from .config import PoetxConfig
from .errors import PoetxError, PoetxWarning

__all__ = ["PoetxConfig", "PoetxError", "PoetxWarning"]
