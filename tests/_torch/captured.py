"""A small model, and the graph that Dynamo captures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Compiled = Callable[..., Any]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


def capture(function: Callable[..., Any], *args: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and its inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]
