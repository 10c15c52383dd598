"""Tensor operations by schema, one implementation a device; this package knows tensors only.

``poetx::block_gram``, ``poetx::cayley_neumann``, ``poetx::rotate_`` and ``poetx::effective`` mean what :mod:`.naive` says,
``poetx::spread_evenly`` what :func:`.polar.spread_in_torch` does.

``cayley_neumann``, ``rotate_`` and ``effective`` take a ``precision`` of the products on a GPU: ``ieee`` (float32 products),
``tf32x3`` (three products of 11 bits each, nearly as exact) or ``tf32`` (one). ``cayley_neumann`` with ``tf32`` hands on
``4096 E`` in float16: the 11 bits that ``rotate_`` multiplies.
"""

from . import ops
from .dense import project
from .effective import Made, effective, lean_weight
from .group import compose_, orthogonalize_
from .linear import LINEAR_VERSION, lean_linear, rotated_linear
from .many import Turn, rotate_all_
from .naive import pack_skew, unpack_skew
from .polar import orthogonalize_skew, spread_evenly
from .precision import full_precision, unscaled
from .quantize import GROUP, quantize_
from .residual import HALF, decode, master_dtype, new_residual
from .stochastic import round_stochastically_

block_gram = ops.block_gram
cayley_neumann = ops.cayley_neumann
rotate_ = ops.rotate_

__all__ = [
    "GROUP",
    "HALF",
    "LINEAR_VERSION",
    "Made",
    "Turn",
    "block_gram",
    "cayley_neumann",
    "compose_",
    "decode",
    "effective",
    "full_precision",
    "lean_linear",
    "lean_weight",
    "master_dtype",
    "new_residual",
    "orthogonalize_",
    "orthogonalize_skew",
    "pack_skew",
    "project",
    "quantize_",
    "rotate_",
    "rotate_all_",
    "rotated_linear",
    "round_stochastically_",
    "spread_evenly",
    "unpack_skew",
    "unscaled",
]
