"""The work that is compared: one linear layer's forward and backward pass, and the step that updates its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timing import Work
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from poetx_compile.config import PoetxConfig
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import LINEAR_VERSION, rotated_linear
from poetx_compile.retraction import retract_all, spread_all

DTYPE = torch.bfloat16
TYPICAL_SKEW = 2e-3
"""Standard deviation of what an optimizer writes into ``q`` in one step."""

_ELEMENTS = 128 << 20
_FEWEST, _MOST = 4, 32


class Source:
    """Random tensors on a device, from a generator of their own: a failed capture can break the device's default one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self.device) * scale

    def weight(self, m: int, n: int) -> nn.Parameter:
        return nn.Parameter(self.normal(m, n, scale=n**-0.5))


def training(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, trained: nn.Parameter) -> Work:
    """Forward and backward of ``layer``. Its output is dropped in between: it stays only where the method keeps it."""

    def run() -> None:
        torch.autograd.backward(get_gradient_edge(layer(x)), g)

    def before() -> None:
        x.grad = trained.grad = None

    return Work(run, before)


def linear(source: Source, m: int, n: int, x: Tensor, g: Tensor) -> Work:
    """An ordinary layer: ``x`` ``[N, n]``, ``g`` ``[N, m]``."""
    weight = source.weight(m, n)
    return training(lambda x: F.linear(x, weight), x, g, weight)


def poetx(source: Source, m: int, n: int, x: Tensor, g: Tensor, block: int) -> Work:
    """The same layer, rotated: its arguments are those that ``poetx_compile.passes.rewrite`` gives."""
    weight = source.weight(m, n)
    factor = OrthogonalFactor(weight, "layer", PoetxConfig(block_size=block))
    settings = (factor.rows.width, factor.columns.width, factor.config.scale, False, LINEAR_VERSION)
    runs = (factor.rows.run, factor.columns.run)
    return training(lambda x: rotated_linear(x, weight, None, *factor.inputs.values(), *settings, *runs), x, g, factor.q)


def weights_at_once(m: int, n: int) -> int:
    """How many weights one update takes: about 128 Mi elements, as the layers of a model would."""
    return max(_FEWEST, min(_MOST, _ELEMENTS // (m * n)))


def adamw(source: Source, m: int, n: int, count: int) -> Work:
    """AdamW's step over ``count`` weights."""
    return Work(_adamw(source, [source.weight(m, n) for _ in range(count)]).step, _nothing)


def retract(source: Source, m: int, n: int, count: int, block: int, is_even: bool = False) -> Work:
    """The fold of the rotations that stand in ``q`` into ``count`` weights, made even before where asked for."""
    weights, factors = _factors(source, m, n, count, block)
    values = [source.normal(*factor.q.shape, scale=TYPICAL_SKEW, dtype=factor.q.dtype) for factor in factors]

    def run() -> None:
        if is_even:
            spread_all(factors)
        retract_all((factor, 1.0) for factor in factors)

    return Work(run, lambda: fill([factor.q for factor in factors], values), weights)


def step_and_retract(source: Source, m: int, n: int, count: int, block: int) -> Work:
    """AdamW's step over the ``q`` of ``count`` weights, even steps, and the fold: all that replaces AdamW over the weights."""
    weights, factors = _factors(source, m, n, count, block)
    optimizer = _adamw(source, [factor.q for factor in factors], lr=TYPICAL_SKEW)

    def run() -> None:
        optimizer.step()
        spread_all(factors)
        retract_all((factor, 1.0) for factor in factors)

    return Work(run, _nothing, weights)


@torch.no_grad()
def fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def _factors(source: Source, m: int, n: int, count: int, block: int) -> tuple[list[nn.Parameter], list[OrthogonalFactor]]:
    """Weights, and their factors, which do not keep them alive."""
    config = PoetxConfig(block_size=block)
    weights = [source.weight(m, n) for _ in range(count)]
    return weights, [OrthogonalFactor(weight, f"layers.{number}", config) for number, weight in enumerate(weights)]


def _adamw(source: Source, parameters: Sequence[nn.Parameter], lr: float = 1e-3) -> torch.optim.AdamW:
    for parameter in parameters:
        parameter.grad = source.normal(*parameter.shape, dtype=parameter.dtype)
    on_gpu = source.device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, fused=on_gpu, capturable=on_gpu)


def _nothing() -> None:
    return None
