"""The memory of a training step: a bound on it, and where it goes, by walking what is kept alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from official import RefusalError
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile.registry import factors


def hold_below(cap_bytes: int, device: torch.device) -> None:
    """Let PyTorch's allocator hold at most so many bytes on a CUDA device, in this process, from now on.

    Raises:
        RefusalError: the card has less.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    if cap_bytes > total:
        raise RefusalError(f"--cap of {cap_bytes / 1e9:g} GB is above the {total / 1e9:.1f} GB of this card: give less")
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total, index)


def account(module: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> dict[str, int]:
    """Bytes on the device that belong to a model in training, each storage counted once, where it is first met.

    Weights are parameters and buffers, and the bases of those that are stored lean, whose rotations are residuals. States are
    those of optimizers, and of rotations: ``q`` and its permutations.
    """
    rotations = factors.of_module(module)
    lean = [factor.base for factor in rotations if factor.base is not None]
    parts: dict[str, Iterable[Any]] = {
        "weight_bytes": [*module.parameters(), *module.buffers(), *((base.stored, base.scales) for base in lean)],
        "residual_bytes": [*(factor.residual for factor in rotations), *((base.rows, base.columns) for base in lean)],
        "gradient_bytes": [parameter.grad for parameter in module.parameters()],
        "state_bytes": [
            *(state for optimizer in optimizers for state in optimizer.state.values()),
            *((factor.q.detach(), factor.row_channels, factor.column_channels) for factor in rotations),
        ],
    }
    seen: set[int] = set()
    return {name: _bytes(values, device, seen) for name, values in parts.items()}


def _bytes(values: Iterable[Any], device: torch.device, seen: set[int]) -> int:
    total = 0
    for tensor in _tensors(values):
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors within: those that tensor subclasses wrap, and those in containers and in objects' attributes."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
