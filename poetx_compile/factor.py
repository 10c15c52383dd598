"""OrthogonalFactor: everything that one converted weight owns."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import kernels
from ._torch.parameters import own_operations
from ._torch.tensors import fake_tensors
from .base import BASES, Base
from .config import PoetxConfig
from .errors import PoetxError
from .layout import BlockLayout, StackLayout, permutation_key, rounding_seed

log = logging.getLogger(__name__)

ROWS, COLUMNS = 0, 1

Matrices: TypeAlias = tuple[Tensor, Tensor | None]
"""Weights ``[count, m, n]``, and their residuals."""


class OrthogonalFactor:
    """The rotation of one weight ``W`` ``[m, n]``: ``W ← G_rows W G_columns`` after each optimizer step.

    A weight of more dimensions is read as a stack of matrices ``[count, m, n]``, by default over its last two dimensions.
    Each matrix has blocks and rotations of its own, all by one permutation.

    Where the weight is stored lean, ``W`` is ``W₀`` between two rotations, in :attr:`base`, and a step is folded into these;
    the parameter that the user holds has no memory of its own then.

    Attributes:
        stack: the matrices of the weight, and their blocks.
        q: ``nn.Parameter``, 1-D, float32 (float64 for float64 weights, bfloat16 for half-precision ones if so set): for each
            matrix packed skew parameters of all row blocks, then of all column blocks. Zero whenever the model runs; what the
            optimizer writes there is this step's rotation.
        row_channels, column_channels: int64, the channels of the blocks; their storage stays for life.
        residual: what half-precision weights lose by rounding: int8 of the weight's shape, or two numbers a byte, or None.
        storage: how the weight is stored: ``folded``, as itself, or one of :data:`.base.BASES`.
        base: what stands for a lean weight, once it is packed.
        origin: fingerprint of the values that were packed or written last, while no rotation has come since; see
            :mod:`.checkpoint`.
        epoch: number of the current draw of permutations.
        steps: counted optimizer steps.
        route: how its gradient is made: ``gram`` or ``dense``.
        is_reduced: whether DistributedDataParallel averages the gradients of ``q`` over ranks.
        is_covered: whether it is known that some optimizer steps it, or the user was told that none does.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        name: str,
        config: PoetxConfig,
        matrices: tuple[int, int, int] | None = None,
        storage: str = "folded",
    ) -> None:
        self._weight = weakref.ref(weight)
        self.name = name
        self.config = config
        self.stack = StackLayout.of(matrices or stacked(weight), config.block_size, config.chunk, config.sides)
        self.rows, self.columns = self.stack.rows, self.stack.columns
        self.key = permutation_key(config.seed, name)
        self.epoch = 0
        self.steps = 0
        self.route = "dense"
        self.is_covered = False
        self.is_reduced = False
        self.hook: RemovableHandle | None = None
        device = weight.device
        self.q = nn.Parameter(torch.zeros(self.stack.skew, dtype=self._skew_dtype(weight.dtype), device=device))
        self.row_channels = torch.empty(self.rows.rotated, dtype=torch.int64, device=device)
        self.column_channels = torch.empty(self.columns.rotated, dtype=torch.int64, device=device)
        self.storage = storage
        self.base: Base | None = None
        self.origin: Tensor | None = None
        self.residual = self._new_residual()
        self.draw()
        self._shape = weight.shape
        self._dtype = weight.dtype
        self._seen = weight._version
        self._clean = self.q._version

    @property
    def weight(self) -> nn.Parameter:
        weight = self._weight()
        assert weight is not None, "a factor is reached through its weight"
        return weight

    def is_of(self, weight: object) -> bool:
        """Whether it belongs to this very object."""
        return self._weight() is weight

    @property
    def is_clean(self) -> bool:
        """Whether ``q`` is untouched since it was last zeroed. Writes through ``.data`` go unseen."""
        return self.q._version == self._clean

    @property
    def precision(self) -> str:
        """Of the products that make and apply rotations, on a GPU: by default that of the 24 bits, or 16, of the weight."""
        if self.config.precision != "auto":
            return self.config.precision
        return "tf32" if self._dtype in kernels.HALF else "tf32x3"

    @property
    def is_packed(self) -> bool:
        """Whether the weight stands as it is to be stored."""
        return self.storage == "folded" or self.base is not None

    @property
    def kept(self) -> dict[str, Tensor]:
        """What is kept of the weight beside, or in place of, its own numbers."""
        if self.base is not None:
            return self.base.tensors
        return {} if self.residual is None else {"residual": self.residual}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a rewritten graph takes beside the weight, or in its place."""
        own = {"q": self.q, "row_channels": self.row_channels, "column_channels": self.column_channels}
        base = self.base or self._blank
        return own if base is None else own | base.tensors

    @property
    def _blank(self) -> Base | None:
        """What :attr:`base` will be once the weight is packed, without values."""
        if self.storage == "folded":
            return None
        weight = self.weight
        with fake_tensors():
            return BASES[self.storage](torch.empty(self._shape, dtype=weight.dtype, device=weight.device), self.stack)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, when it was last looked at."""
        return self._dtype

    def made(self, dtype: torch.dtype | None = None) -> kernels.Made:
        """What a lean weight is made of; ``dtype`` None takes its own."""
        assert self.base is not None
        base, dtype = self.base, dtype or self._dtype
        channels = self.row_channels, self.column_channels
        sides = (base.rows, channels[0], base.columns, channels[1])
        return kernels.Made(base.stored, base.scales, *sides, dtype, self.columns.run, self.precision)

    def _skew_dtype(self, dtype: torch.dtype) -> torch.dtype:
        is_short = self.config.skew_dtype == "bfloat16" and dtype in kernels.HALF
        return torch.bfloat16 if is_short else kernels.master_dtype(dtype)

    def _new_residual(self) -> Tensor | None:
        return kernels.new_residual(
            self.weight, self.stack.shape, self.config.residual_bits if self.storage == "folded" else 0
        )

    def draw(self) -> None:
        """Write the permutations of the current epoch into place."""
        self.row_channels.copy_(self.rows.channels(self.key, ROWS, self.epoch))
        self.column_channels.copy_(self.columns.channels(self.key, COLUMNS, self.epoch))

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient of ``q`` that belongs to a gradient of the weight, of its shape: the dense route."""
        gradient, weight = gradient.reshape(self.stack.shape), self.weight.detach().reshape(self.stack.shape)
        channels = self.row_channels, self.column_channels
        widths, runs = (self.rows.width, self.columns.width), (self.rows.run, self.columns.run)
        packed = kernels.project(gradient, weight, *channels, widths, runs, 2 * self.config.scale)
        return packed.to(self.q.dtype)

    def clear(self) -> None:
        """Forget a rotation that was never folded: the weight stays as it was before the step."""
        with torch.no_grad():
            self.q.zero_()
        self.forget()

    def skews(self) -> Iterator[tuple[Tensor, BlockLayout]]:
        """The packed skew parameters, and the blocks, of each side that is rotated: rows, then columns, matrix by matrix."""
        sides = self.stack.sides * self.stack.count
        yield from zip(self.q.split([side.skew for side in sides]), sides)

    def matrices(self) -> Matrices:
        """A weight that is stored as itself, and its residual: views, or copies where memory has another order.

        A residual that belongs to other values is dropped first.
        """
        self.check_residual()
        residual = self.residual
        packed = None if residual is None else residual.reshape(*self.stack.shape[:2], -1)
        return self.weight.data.reshape(self.stack.shape), packed

    def turns(self, matrices: Matrices, rotations: Sequence[Tensor]) -> Iterator[kernels.Turn]:
        """``W ← (I + E_rows) W (I + E_columns)`` of each matrix.

        Args:
            rotations: ``E`` of each side in :meth:`skews`, ``[r, b, b]``.
        """
        given = iter(rotations)
        weights, residuals = matrices
        is_lossy = residuals is None and weights.dtype in kernels.HALF
        for place, weight in enumerate(weights):
            residual = None if residuals is None else residuals[place]
            rows = next(given) if self.rows.count else None
            columns = next(given) if self.columns.count else None
            sides = (rows, self.row_channels, columns, self.column_channels)
            seed = rounding_seed(self.key, self.steps, place) if is_lossy else None
            yield kernels.Turn(weight, residual, *sides, self.columns.run, self.precision, seed)

    def write(self, matrices: Matrices) -> None:
        """Take :meth:`matrices` over, which were turned in place, and tell autograd."""
        weights, residuals = matrices
        _write_back(self.weight.data, weights)
        if self.residual is not None and residuals is not None:
            _write_back(self.residual, residuals)
        torch.autograd.graph.increment_version(self.weight)
        self._seen = self.weight._version

    def turn_base(self, rotations: Sequence[Tensor]) -> None:
        """Multiply rotations, as :meth:`turns` takes them, into those of a lean weight."""
        assert self.base is not None
        given = iter(rotations)
        rows, columns = (next(given) if side.count else None for side in (self.rows, self.columns))
        self.base.turn(rows, columns, self.steps)
        self.origin = None
        torch.autograd.graph.increment_version(self.weight)

    def forget(self) -> None:
        """Take ``q`` for untouched from now on: it was set to zero."""
        self._clean = self.q._version

    def check_residual(self) -> None:
        """Drop the residual of a weight that was written from outside: it belongs to other values."""
        if self.base is not None or self.weight._version == self._seen:
            return
        if self.residual is not None:
            self.residual.zero_()
            log.info("%s was written from outside: its residual starts again at zero", self.name)
        self._seen = self.weight._version

    def count_step(self) -> bool:
        """Count an optimizer step; draw new permutations when they are due, and say so."""
        self.steps += 1
        period = self.config.permutation_period
        if not period or self.steps % period:
            return False
        self._settle()
        self.epoch += 1
        self.draw()
        return True

    def _settle(self) -> None:
        """Make a lean weight its own base: rotations by other permutations are to come."""
        if self.base is None or not self.base.is_turned:
            return
        exact = self.made(kernels.master_dtype(self._dtype)).weight()
        self.base.write(exact, rounding_seed(self.key, self.steps, 0))

    def resume(self, key: int, epoch: int, steps: int, kept: dict[str, Tensor] | None) -> None:
        """Continue where a checkpoint stopped.

        Args:
            kept: as :attr:`kept`; None means that none of it belongs to this weight, which stays what it is.
        """
        if kept is None and (key, epoch) != (self.key, self.epoch):
            self._settle()
        self.key, self.epoch, self.steps = key, epoch, steps
        self.draw()
        if self.base is not None:
            if kept is not None:
                self.base.load(kept)
                self.origin = None
        elif self.residual is not None:
            if kept is None:
                self.residual.zero_()
            else:
                self.residual.copy_(kept["residual"])
        self._seen = self.weight._version

    def start_again(self) -> None:
        """Count steps and draws of permutations as at conversion."""
        if self.epoch:
            self._settle()
        self.key, self.epoch, self.steps = permutation_key(self.config.seed, self.name), 0, 0
        self.draw()

    def follow_weight(self) -> None:
        """Move with a weight that changed its device or dtype, and with a gradient that did, as ``model.to(...)`` does.

        Raises:
            PoetxError: the weight has another shape than at conversion.
        """
        weight = self.weight
        with own_operations():
            shape, device, dtype = weight.shape, weight.device, weight.dtype
        if shape != self._shape:
            raise PoetxError(
                f"poetx: '{self.name}' was converted as {' x '.join(map(str, self._shape))} and is now "
                f"{' x '.join(map(str, shape))}; call poetx_compile.restore(model) before changing a weight's shape"
            )
        if device == self.q.device and dtype == self._dtype:
            grad = self.q.grad
            if grad is not None and (grad.dtype, grad.device) != (self.q.dtype, device):  # torch moves W.grad by its data
                self.q.grad = grad.to(device, self.q.dtype)
            return
        skew_dtype = self._skew_dtype(dtype)
        grad, self.q.grad = self.q.grad, None
        self.q.data = self.q.data.to(device, skew_dtype)
        self.q.grad = None if grad is None else grad.to(device, skew_dtype)
        self.row_channels = self.row_channels.to(device)
        self.column_channels = self.column_channels.to(device)
        if self.base is not None:
            self.base.to(device)
        elif dtype != self._dtype:
            self.residual = self._new_residual()
        elif self.residual is not None:
            self.residual = self.residual.to(device)
        self._dtype = dtype
        self._clean = self.q._version


def stacked(weight: Tensor) -> tuple[int, int, int]:
    """``[count, m, n]`` of a weight whose last two dimensions are matrices."""
    m, n = weight.shape[-2:]
    return weight.shape[:-2].numel(), m, n


def _write_back(tensor: Tensor, matrices: Tensor) -> None:
    """Copy what ``reshape`` had to copy: a kernel in channels-last memory has no view as a matrix."""
    if matrices.data_ptr() != tensor.data_ptr():
        tensor.copy_(matrices.view(tensor.shape))
