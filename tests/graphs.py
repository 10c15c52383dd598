"""Graphs as Dynamo captures them, for the tests of the passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from spellings import INPUTS, Spelled, Spelling
from torch import Tensor, fx, nn

from poetx_compile import PoetxConfig
from poetx_compile._torch.graphs import copy_graph
from poetx_compile.passes import LinearMatch, Skip, SkipReason, match, normalize

CONFIG = PoetxConfig(block_size=16)


@dataclass(frozen=True)
class Captured:
    """A graph that may be edited, and the value of each of its placeholders."""

    gm: fx.GraphModule
    inputs: dict[fx.Node, Any]

    def __call__(self, *extra: Tensor) -> Tensor:
        """The first output."""
        result: Tensor = self.gm(*self.inputs.values(), *extra)[0]
        return result

    @property
    def targets(self) -> list[Any]:
        """What is called, in order."""
        return [node.target for node in self.gm.graph.nodes if node.op in ("call_function", "call_method")]

    def placeholder(self, value: object) -> fx.Node:
        return next(node for node, held in self.inputs.items() if held is value)

    def normalized(self) -> Captured:
        normalize(self.gm, self.inputs)
        self.gm.graph.lint()
        self.gm.recompile()
        return self

    def copy(self) -> Captured:
        gm = copy_graph(self.gm)
        return Captured(gm, dict(zip(_placeholders(gm), self.inputs.values())))

    def matched(self, config: PoetxConfig = CONFIG) -> tuple[dict[str, LinearMatch], dict[str, Skip]]:
        """What :func:`match` says of each parameter, by name."""
        matches, skips = match(self.gm, self.inputs, config)
        return {found.name: found for found in matches}, {skip.name: skip for skip in skips}


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Captured:
    """The first graph that Dynamo makes of a call."""
    captured: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        copy = copy_graph(gm)
        captured.append(Captured(copy, dict(zip(_placeholders(copy), example_inputs))))
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return captured[0]


def spelled(spelling: Spelling, *shape: int) -> tuple[Spelled, Captured]:
    """A layer written so, and its graph for an input of this shape. Each is captured once and copied."""
    layer, captured = _spelled(spelling, shape)
    return layer, captured.copy()


@functools.cache
def _spelled(spelling: Spelling, shape: tuple[int, ...]) -> tuple[Spelled, Captured]:
    layer = spelling.layer()
    return layer, capture(layer, torch.randn(shape or (5, INPUTS), dtype=torch.float64))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def reasons(module: nn.Module, *args: Any, config: PoetxConfig = CONFIG) -> dict[str, SkipReason | None]:
    """Why each parameter is left alone; None for those that are converted."""
    matches, skips = capture(module, *args).normalized().matched(config)
    return dict.fromkeys(matches) | {name: skip.reason for name, skip in skips.items()}
