"""Lean storage: a base matrix that is not rewritten at every step, and the rotations that it has made since."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from . import kernels
from .errors import PoetxError
from .layout import BlockLayout, StackLayout

_STEPS_BETWEEN_CORRECTIONS = 16


class Base(ABC):
    """``W = (I + E_rows) W₀ (I + E_columns)``: a step multiplies the rotations, and leaves ``W₀`` alone.

    Attributes:
        stored: ``W₀`` ``[m, n]``, or its codes.
        scales: of codes, else None.
        rows, columns: ``E = G − I`` of each side that is rotated, ``[r, b, b]``, float32, or float64 for float64 weights.
        is_turned: whether they are more than zeros.
    """

    stored: Tensor
    scales: Tensor | None = None

    def __init__(self, weight: Tensor, stack: StackLayout) -> None:
        self.rows = _still(weight, stack.rows)
        self.columns = _still(weight, stack.columns)
        self.is_turned = False

    @abstractmethod
    def _round(self, matrix: Tensor, seed: int | None) -> None: ...

    def write(self, matrix: Tensor, seed: int | None = None) -> None:
        """Put a matrix in the place of ``W₀``, and start again without rotations.

        Args:
            matrix: ``[m, n]``.
            seed: of stochastic rounding; None rounds to nearest.
        """
        self._round(matrix, seed)
        for turn in (self.rows, self.columns):
            if turn is not None:
                turn.zero_()
        self.is_turned = False

    def turn(self, rows: Tensor | None, columns: Tensor | None, step: int) -> None:
        """``G_rows ← G G_rows`` and ``G_columns ← G_columns G``, of the rotations ``E = G − I`` of one step."""
        for turn, by in ((self.rows, rows), (self.columns, columns)):
            if turn is not None and by is not None:
                kernels.compose_(turn, by, from_left=turn is self.rows)
                if step % _STEPS_BETWEEN_CORRECTIONS == 0:
                    kernels.orthogonalize_(turn)
        self.is_turned = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it keeps, by name."""
        named = {"stored": self.stored, "scales": self.scales, "turned_rows": self.rows, "turned_columns": self.columns}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def number_bytes(self) -> int:
        """Of ``W₀`` alone."""
        return self.stored.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy what :attr:`tensors` of another base named."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.is_turned = True

    def to(self, device: torch.device) -> None:
        self.stored = self.stored.to(device)
        self.scales, self.rows, self.columns = (
            None if tensor is None else tensor.to(device) for tensor in (self.scales, self.rows, self.columns)
        )


class Int8(Base):
    """Codes of 8 bits, and a bfloat16 scale for each 128 of a row."""

    def __init__(self, weight: Tensor, stack: StackLayout) -> None:
        super().__init__(weight, stack)
        m, n = weight.shape
        self.stored = torch.empty(m, n, dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(m, -(-n // kernels.GROUP), dtype=torch.bfloat16, device=weight.device)

    def _round(self, matrix: Tensor, seed: int | None) -> None:
        assert self.scales is not None
        kernels.quantize_(self.stored, self.scales, matrix, seed)


class Lean(Base):
    """The dtype of the weight, without the digits below."""

    def __init__(self, weight: Tensor, stack: StackLayout) -> None:
        super().__init__(weight, stack)
        self.stored = torch.empty_like(weight, requires_grad=False, memory_format=torch.contiguous_format)

    def _round(self, matrix: Tensor, seed: int | None) -> None:
        if seed is None or self.stored.dtype not in kernels.HALF:
            self.stored.copy_(matrix)
        else:
            kernels.round_stochastically_(self.stored, matrix, seed)


BASES: dict[str, type[Base]] = {"int8": Int8, "bf16-lean": Lean}
"""By the names that ``storage`` takes."""


def check_range(matrix: Tensor, name: str, storage: str) -> None:
    """Raises:
    PoetxError: the matrix holds numbers of which no group of codes can be made. Waits for the device.
    """
    largest = torch.finfo(matrix.dtype).max / 2
    if storage == "int8" and not bool((matrix.abs() <= largest).all()):
        raise PoetxError(
            f"poetx: '{name}' holds NaN, infinite or very large numbers, which int8 cannot keep; correct them, or leave the weight "
            f"out with options={{'exclude': ['{name}']}}"
        )


def _still(weight: Tensor, side: BlockLayout) -> Tensor | None:
    if not side.count:
        return None
    dtype = kernels.master_dtype(weight.dtype)
    return torch.zeros(side.count, side.width, side.width, dtype=dtype, device=weight.device)
