"""Tensors without memory, and tensors in nested containers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode


def is_fake(value: Any) -> bool:
    """Whether a tensor has no values: a compiler is looking."""
    return isinstance(value, FakeTensor)


def fake_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors have shapes, dtypes and strides, and no memory."""
    return FakeTensorMode()


def storage_of(tensor: Tensor) -> object:
    """Equal for tensors that share memory, or would if they had any."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested containers with every tensor replaced."""
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)
