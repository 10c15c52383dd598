"""However a model is compiled, it trains the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Block, loss, network, train, values
from modes import DEBUG, SETTINGS, STANCES
from torch import Tensor, nn

from poetx_compile.registry import factors

WHOLE: dict[str, Any] = {"block_size": 256, "chunk": 0}


def trained(compile: Callable[[nn.Module], Any], steps: int = 3) -> list[Tensor]:
    model = network()
    train(compile(model), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), range(steps))
    assert {name for name, weight in model.named_parameters() if factors.of_weight(weight)} == {"0.weight", "2.weight"}
    return values(model)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_compile(name: str) -> None:
    settings = SETTINGS[name]
    blocks = DEBUG if "options" in settings else DEBUG | WHOLE
    expected = trained(lambda model: torch.compile(model, backend="poetx", options=blocks))
    torch._dynamo.reset()
    if "options" not in settings and "mode" not in settings:
        settings = settings | {"options": WHOLE}
    for ours, theirs in zip(trained(lambda model: torch.compile(model, backend="poetx", **settings)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stance", STANCES)
def test_stances_of_a_converted_model(stance: str) -> None:
    """Eager or compiled, a converted weight learns by rotation."""
    expected = trained(lambda model: torch.compile(model, backend="poetx", options=DEBUG))
    torch._dynamo.reset()
    model = network()
    compiled, optimizer = (
        torch.compile(model, backend="poetx", options=DEBUG),
        torch.optim.SGD(model.parameters(), 0.05, 0.9),
    )
    train(compiled, optimizer, range(1))
    with torch.compiler.set_stance(stance):
        train(compiled, optimizer, range(1, 3))
    for ours, theirs in zip(values(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_under_force_eager_from_the_start_nothing_is_converted() -> None:
    model, reference = network(), network()
    with torch.compiler.set_stance("force_eager"):
        train(torch.compile(model, backend="poetx", options=DEBUG), torch.optim.SGD(model.parameters(), 0.05), range(2))
    train(reference, torch.optim.SGD(reference.parameters(), 0.05), range(2))
    assert not any(factors.of_weight(parameter) for parameter in model.parameters())
    for ours, theirs in zip(values(model), values(reference), strict=True):
        assert torch.equal(ours, theirs)


def test_module_compile_block_by_block() -> None:
    """Regional compilation: blocks share code and names, and train as the same block compiled by ``torch.compile`` does."""
    blocks = nn.ModuleList([Block() for _ in range(3)])
    alone = Block()
    for block in blocks:
        block.compile(backend="poetx", options=DEBUG)
    train(
        torch.compile(alone, backend="poetx", options=DEBUG),
        torch.optim.SGD(alone.parameters(), 0.05, momentum=0.9),
        range(3),
    )
    optimizer = torch.optim.SGD(blocks.parameters(), 0.05, momentum=0.9)
    for step in range(3):
        torch.stack([loss(block, step) for block in blocks]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factors.of_weight(alone.layers[0].weight)
    for block in blocks:
        for ours, theirs in zip(values(block), values(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
