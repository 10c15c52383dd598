"""A checksum of a tensor's bits."""

from __future__ import annotations

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 22


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 on the tensor's device that changes with any bit, or its place."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    words = tensor.detach().contiguous().flatten().view(torch.int16 if tensor.element_size() > 1 else torch.int8)
    for number, piece in enumerate(words.split(_NUMBERS_AT_ONCE), start=1):
        bits = piece.to(torch.int32)
        places = torch.arange(bits.numel(), device=bits.device, dtype=torch.int32) % 8191 + 1
        total += number * (bits * places).sum(dtype=torch.int64)
    return total
