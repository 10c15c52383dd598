"""Tensor operations by schema, one implementation a device; this package knows tensors only.

``poetx::block_gram``, ``poetx::cayley_neumann`` and ``poetx::rotate_`` mean what :mod:`.naive` says.
"""

from . import ops
from .linear import LINEAR_VERSION, rotated_linear
from .naive import project
from .residual import HALF, decode, master_dtype

block_gram = ops.block_gram
cayley_neumann = ops.cayley_neumann
rotate_ = ops.rotate_

__all__ = [
    "HALF",
    "LINEAR_VERSION",
    "block_gram",
    "cayley_neumann",
    "decode",
    "master_dtype",
    "project",
    "rotate_",
    "rotated_linear",
]
