"""The least time of a whole training step, part by part.

Counted are the products of linear layers, attention, embedding and head, and what the optimizer moves; norms, activation
functions, residual sums and the loss are not, so that a floor stays below what any program does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import floors
from floors import Kernel, Peaks, floor_ms
from llama import Size

PerLinear = Callable[[int, int], Sequence[Kernel]]
"""Kernels of one linear layer, by its outputs and inputs."""


@dataclass(frozen=True)
class StepFloor:
    """What a training step must do: forward and backward of all micro-batches, then the optimizer, then the fold."""

    training: Sequence[Kernel]
    optimizer: Sequence[Kernel]
    retraction: Sequence[Kernel] = ()

    @property
    def kernels(self) -> list[Kernel]:
        return [*self.training, *self.optimizer, *self.retraction]

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    def ms(self, peaks: Peaks | None) -> dict[str, float | None]:
        """Milliseconds of each part, and of the step."""
        return {
            "floor_training_ms": floor_ms(self.training, peaks),
            "floor_optimizer_ms": floor_ms(self.optimizer, peaks),
            "floor_retraction_ms": floor_ms(self.retraction, peaks),
            "floor_ms": floor_ms(self.kernels, peaks),
        }


@dataclass(frozen=True)
class Load:
    """A model, and what one optimizer step sends through it: ``micro`` batches of ``batch`` sequences of ``length``."""

    size: Size
    batch: int
    length: int
    micro: int = 1

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.length

    def _linears(self, kernels: PerLinear) -> list[Kernel]:
        return self.size.layers * [kernel for m, n in self.size.linears for kernel in kernels(m, n)]

    def _training(self, linear: PerLinear, head_is_trained: bool = True) -> list[Kernel]:
        size, tokens = self.size, self.tokens
        rest = size.layers * floors.attention(size.hidden, tokens, self.length)
        head = (floors.linear if head_is_trained else floors.frozen)(size.vocabulary, size.hidden, tokens)
        table = floors.embedding(size.vocabulary, size.hidden, tokens, head_is_trained)
        return self.micro * [*self._linears(linear), *rest, *head, *table]

    def _dense(self, optimizer: Sequence[Kernel]) -> StepFloor:
        return StepFloor(self._training(lambda m, n: floors.linear(m, n, self.tokens)), optimizer)

    def adamw(self) -> StepFloor:
        return self._dense(floors.adamw(self.size.parameters))

    def eight_bit_adamw(self) -> StepFloor:
        return self._dense(floors.eight_bit_adamw(self.size.parameters))

    def adafactor(self) -> StepFloor:
        return self._dense(floors.adafactor(self.size.parameters))

    def muon(self) -> StepFloor:
        return self._dense([*floors.adamw(self.size.outside), *self._linears(floors.muon)])

    def low_rank(self, rank: int, is_projected_back: bool) -> StepFloor:
        step = self._linears(lambda m, n: floors.low_rank(m, n, rank, is_projected_back))
        return self._dense([*floors.adamw(self.size.outside), *step])

    def lora(self, rank: int) -> StepFloor:
        training = self._training(lambda m, n: floors.lora(m, n, self.tokens, rank), head_is_trained=False)
        trained = self.size.layers * sum(rank * (m + n) for m, n in self.size.linears)
        return StepFloor(training, floors.adamw(trained))

    def poetx(self, block: int, is_even: bool = True) -> StepFloor:
        training = self._training(lambda m, n: floors.poetx(m, n, self.tokens, block))
        optimizer = [*floors.adamw(self.size.outside), *floors.adamw(self._skews(block), width=4)]
        even = self._linears(lambda m, n: floors.even_steps(m, n, block)) if is_even else []
        return StepFloor(training, optimizer, [*even, *self._linears(lambda m, n: floors.retract(m, n, block))])

    def official(self, block: int, is_lean: bool, period: int) -> StepFloor:
        layer = floors.official_mem if is_lean else floors.official_fast
        training = self._training(lambda m, n: layer(m, n, self.tokens, block))
        optimizer = [*floors.adamw(self.size.outside), *floors.adamw(self._skews(block))]
        merge = self._linears(lambda m, n: floors.official_merge(m, n, block))
        return StepFloor(training, optimizer, floors.per_step(merge, period))

    def _skews(self, block: int) -> int:
        return self.size.layers * sum(floors.skews(m, n, block) for m, n in self.size.linears)
