"""Fake tensors, and tensors in nested containers."""

from __future__ import annotations

import torch
from torch import nn

from poetx_compile._torch.tensors import fake_tensors, is_fake, map_tensors, storage_of, tensors_in


def test_tensors_in_nested_containers() -> None:
    tree = {"a": [torch.ones(1), 3], "b": (torch.zeros(2), None)}
    assert [tensor.shape[0] for tensor in tensors_in(tree)] == [1, 2]
    doubled = map_tensors(lambda tensor: torch.cat([tensor, tensor]), tree)
    assert [tensor.shape[0] for tensor in tensors_in(doubled)] == [2, 4]
    assert (doubled["a"][1], doubled["b"][1]) == (3, None)


def test_fake_tensors_have_shapes_and_share_storages() -> None:
    with fake_tensors():
        fake = torch.empty(10**6, 10**6)
        other = fake + 1
    assert is_fake(fake)
    assert not is_fake(torch.empty(1))
    assert fake.untyped_storage().nbytes() == 4 * 10**12
    assert storage_of(fake) == storage_of(fake.T) != storage_of(other)


def test_a_parameter_made_of_fake_tensors_is_one_and_fake() -> None:
    with fake_tensors():
        weight = nn.Linear(3, 4).weight
    assert isinstance(weight, nn.Parameter)
    assert is_fake(weight)
