"""The authors' layers, imported at run time from a checkout of github.com/Sphere-AI-Lab/poet."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from methods import DTYPE, TYPICAL_SKEW, Source, fill, training
from timing import Work, one_line
from torch import Tensor


class RefusalError(Exception):
    """Why a row of the official code has no time."""


class Official:
    """The package ``poet_torch`` in the folder ``path``, and how much longer it may compile.

    It compiles its layer anew for every shape and number of tokens, which takes most of the time: once that took
    ``minutes`` altogether, the rows left over are refused.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self._seconds_left = 60 * minutes
        self._package: ModuleType | None = None
        self._refusal = ""
        try:
            self._package = import_official(path)
        except Exception as error:
            self._refusal = f"the official code in {path} cannot be imported: {one_line(error)}"

    def layer(self, source: Source, m: int, n: int, x: Tensor, g: Tensor, block: int, is_lean: bool) -> Work:
        """Forward and backward of the layer ``mem`` (``is_lean``) or ``fast``; it takes ``[batch, tokens, n]``."""

        def make() -> Work:
            layer = self._linear(source, m, n, block, is_lean)
            return training(lambda x: layer(x[None]), x, g[None], layer.oft_R)

        return self._compiled(make)

    def step(self, source: Source, m: int, n: int, count: int, block: int) -> Work:
        """The step of its AdamW over the skew parameters of ``count`` weights, at every step."""

        def make() -> Work:
            parameters = [self._linear(source, m, n, block).oft_R for _ in range(count)]
            for parameter in parameters:
                parameter.grad = source.normal(*parameter.shape)
            optimizer = self.package.POETAdamW([{"params": parameters, "use_poet": True}])
            return Work(optimizer.step, lambda: None)

        return self._compiled(make)

    def merge(self, source: Source, m: int, n: int, count: int, block: int) -> Work:
        """The fold into ``count`` weights, with new permutations: once in ``merge_interval`` steps."""

        def make() -> Work:
            layers = [self._linear(source, m, n, block) for _ in range(count)]
            values = [source.normal(*layer.oft_R.shape, scale=TYPICAL_SKEW) for layer in layers]

            def run() -> None:
                for layer in layers:
                    layer.merge_then_reinitialize()

            return Work(run, lambda: fill([layer.oft_R for layer in layers], values))

        return self._compiled(make)

    @property
    def package(self) -> Any:
        if self._package is None:
            raise RefusalError(self._refusal)
        return self._package

    def _linear(self, source: Source, m: int, n: int, block: int, is_lean: bool = False) -> Any:
        layer = self.package.POETLinear(n, m, block_size=block, bias=False, dtype=DTYPE, mem_efficient_mode=is_lean)
        layer = layer.to(source.device)
        fill([layer.weight], [source.weight(m, n)])
        return layer

    def _compiled(self, make: Callable[[], Work]) -> Work:
        """Make the work and run it once, against the time that is left."""
        if self._seconds_left <= 0:
            raise RefusalError("left out: --official-minutes were used up before")
        start = time.perf_counter()
        try:
            work = make()
            work.before()
            work.run()
            return work
        finally:
            self._seconds_left -= time.perf_counter() - start


def import_official(path: Path) -> ModuleType:
    """Import the package, and let each shape of its compiled layer be its own, as in a model whose shapes are fixed."""
    folder = str(path.resolve())
    sys.path.insert(0, folder)
    try:
        package = importlib.import_module("poet_torch")
    finally:
        sys.path.remove(folder)
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    return package
