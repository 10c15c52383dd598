"""Tensor operations by schema, one implementation a device; this package knows tensors only.

``poetx::block_gram``, ``poetx::cayley_neumann`` and ``poetx::rotate_`` mean what :mod:`.naive` says.

The latter two take a ``precision`` of the products on a GPU: ``ieee`` (float32 products), ``tf32x3`` (three products of 11
bits each, nearly as exact) or ``tf32`` (one). ``cayley_neumann`` with ``tf32`` hands on ``4096 E`` in float16: the 11 bits that
``rotate_`` multiplies.
"""

from . import ops
from .dense import project
from .linear import LINEAR_VERSION, rotated_linear
from .naive import pack_skew, unpack_skew
from .precision import unscaled
from .residual import HALF, decode, master_dtype, new_residual

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
    "new_residual",
    "pack_skew",
    "project",
    "rotate_",
    "rotated_linear",
    "unpack_skew",
    "unscaled",
]
