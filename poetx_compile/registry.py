"""Where the factor of a live weight is found."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import nn

from .factor import OrthogonalFactor


class Registry:
    """Factors by the identity of their weight or of their ``q``. Holds no weight alive: a factor goes with its weight."""

    def __init__(self) -> None:
        self._by_weight: dict[int, OrthogonalFactor] = {}
        self._by_skew: dict[int, OrthogonalFactor] = {}

    def add(self, factor: OrthogonalFactor) -> None:
        weight = id(factor.weight)
        self._by_weight[weight] = factor
        self._by_skew[id(factor.q)] = factor
        weakref.finalize(factor.weight, self._forget, weight, weakref.ref(factor)).atexit = False

    def remove(self, factor: OrthogonalFactor) -> None:
        self._forget(id(factor.weight), weakref.ref(factor))

    def _forget(self, weight: int, reference: weakref.ref[OrthogonalFactor]) -> None:
        factor = reference()
        if factor is None:  # removed before, and others may have its identities now
            return
        for index, identity in ((self._by_weight, weight), (self._by_skew, id(factor.q))):
            if index.get(identity) is factor:
                del index[identity]

    def of_weight(self, weight: object) -> OrthogonalFactor | None:
        factor = self._by_weight.get(id(weight))
        return factor if factor is not None and factor.is_of(weight) else None

    def of_module(self, module: nn.Module) -> list[OrthogonalFactor]:
        """The factors of a module's parameters, in their order."""
        return [factor for weight in module.parameters() if (factor := self.of_weight(weight)) is not None]

    def of_skew(self, q: object) -> OrthogonalFactor | None:
        factor = self._by_skew.get(id(q))
        return factor if factor is not None and factor.q is q else None

    def __iter__(self) -> Iterator[OrthogonalFactor]:
        return iter(list(self._by_weight.values()))

    def __len__(self) -> int:
        return len(self._by_weight)


factors = Registry()
