"""What the tests of training share: a small network, its data, and an independent way to train its rotations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import explicit_weight
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile import PoetxConfig
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.registry import factors
from poetx_compile.testing.explicit import spread

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "block_size": 16, "chunk": 4}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two rotated layers, one of them with left-over channels, and every kind of ordinary parameter around them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(22, 32), nn.Tanh(), nn.Linear(32, 20, bias=False), nn.LayerNorm(20)).to(dtype)


class Block(nn.Module):
    """:func:`network` as a module of one's own: torch compiles nothing of an ``nn.Sequential`` itself, nor of a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Experts(nn.Module):
    """A stack of matrices and two kernels, one of them in channels-last memory, with the sizes of :func:`network`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 22, 20) / 5)
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        self.image = nn.Conv2d(16, 5, (3, 1), padding=(1, 0)).to(memory_format=torch.channels_last)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.bmm(x.expand(3, -1, -1), self.experts).transpose(0, 1)
        return self.image(self.conv(each).tanh()[..., None])[..., 0].sum(1)


def rotating(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="poetx", options=OPTIONS | options)


def loss(model: Callable[[Tensor], Tensor], step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The loss on the data of one (micro-)step, which depend on its number only."""
    generator = torch.Generator().manual_seed(step)
    x, target = (torch.randn(8, size, generator=generator).to(dtype) for size in (22, 20))
    return F.mse_loss(model(x), target)


def train(model: Callable[[Tensor], Tensor], optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        loss(model, step, optimizer.param_groups[0]["params"][0].dtype).backward()
        optimizer.step()
        optimizer.zero_grad()


def factor_of(weight: nn.Parameter) -> OrthogonalFactor:
    factor = factors.of_weight(weight)
    assert factor is not None, "the weight is not converted"
    return factor


def values(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


class Explicit:
    """Trains the same rotations without the package's training machinery: ``q`` is an ordinary parameter, by autograd."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        config = PoetxConfig(**OPTIONS | options)
        self.model = copy.deepcopy(model)
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.ndim == 2}
        self.factors = {name: OrthogonalFactor(weight, name, config) for name, weight in self.weights.items()}
        self.skews = {name: nn.Parameter(torch.zeros_like(factor.q)) for name, factor in self.factors.items()}

    def parameters(self) -> list[nn.Parameter]:
        return [self.skews.get(name, parameter) for name, parameter in self.model.named_parameters()]

    def rotated(self, gain: float = 1.0) -> dict[str, Tensor]:
        return {
            name: explicit_weight(self.factors[name], weight.detach(), gain * self.skews[name])
            for name, weight in self.weights.items()
        }

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.rotated(), (x,))

    @torch.no_grad()
    def fold(self, gain: float = 1.0) -> None:
        for name, skew in self.skews.items():
            skew.copy_(spread(self.factors[name], skew))
        for name, weight in self.rotated(gain).items():
            self.weights[name].copy_(weight)
            self.skews[name].zero_()

    def redraw(self, optimizer: Optimizer, fresh: Optimizer) -> None:
        """New permutations, of which the optimizer knows as much as a fresh one."""
        for name, factor in self.factors.items():
            factor.epoch += 1
            factor.draw()
            optimizer.state.pop(self.skews[name], None)
            if self.skews[name] in fresh.state:
                optimizer.state[self.skews[name]] = fresh.state[self.skews[name]]
