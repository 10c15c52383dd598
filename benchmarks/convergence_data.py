"""A corpus of tokens on the device: training batches that depend on seed and step only, and validation text by kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Tokens:
    """``train.bin`` and ``val.bin`` (uint16, little-endian) of a folder, cut into windows of ``length`` tokens.

    Training windows lie side by side, in an order that each epoch shuffles anew. Validation windows lie within the segments
    that ``meta.json`` lists, each of one kind of text; what a segment has beyond whole windows is left out.

    Attributes:
        vocabulary: number of different tokens.
        train: int16 ``[windows, length]``, the bits of uint16, on the device.
        kinds: of validation text, in their order.
    """

    def __init__(self, folder: Path, length: int, device: torch.device) -> None:
        """Raises:
        ValueError: a file is missing, or a part is shorter than a window.
        """
        paths = [folder / name for name in ("train.bin", "val.bin", "meta.json")]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{folder} has no {', '.join(missing)}: a corpus is train.bin, val.bin and meta.json")
        meta = json.loads(paths[2].read_text())
        self.vocabulary: int = meta["vocab_size"]
        self._device = device
        self.train = _windows(_stream(paths[0]), length).to(device)
        held_out = _stream(paths[1])
        parts: dict[str, list[Tensor]] = {}
        for segment in meta["val_segments"]:
            parts.setdefault(segment["kind"], []).append(_windows(held_out[segment["start"] : segment["end"]], length))
        validation = {kind: torch.cat(windows) for kind, windows in sorted(parts.items()) if any(map(len, windows))}
        if not len(self.train) or not validation:
            raise ValueError(f"{folder} has no window of {length} tokens in {'val' if len(self.train) else 'train'}.bin")
        self.kinds = list(validation)
        self._validation = torch.cat(list(validation.values())).to(device)
        counts = torch.tensor([len(windows) for windows in validation.values()], device=device)
        self._kind = torch.arange(len(counts), device=device).repeat_interleave(counts)
        self._order: tuple[int, int, Tensor] | None = None

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """The windows of one step, int64 ``[size, length]`` on the device.

        Raises:
            ValueError: the corpus has fewer windows than a batch.
        """
        steps = len(self.train) // size
        if not steps:
            raise ValueError(f"the corpus has {len(self.train)} windows, a batch takes {size}")
        epoch, place = divmod(step, steps)
        if self._order is None or self._order[:2] != (seed, epoch):
            generator = torch.Generator().manual_seed((seed << 20) + epoch)
            self._order = seed, epoch, torch.randperm(len(self.train), generator=generator).to(self._device)
        return _numbers(self.train[self._order[2][place * size : (place + 1) * size]])

    def validation_batches(self, size: int) -> list[Tensor]:
        """All validation windows, int64 ``[size, length]`` each: the last is filled up with the first window again."""
        missing = -len(self._validation) % size
        filled = torch.cat([self._validation, self._validation[:1].expand(missing, -1)])
        return [_numbers(part) for part in filled.split(size)]

    def by_kind(self, losses: Tensor) -> tuple[float, dict[str, float]]:
        """The mean of the losses of all validation windows, and that of each kind.

        Args:
            losses: one for each window of :meth:`validation_batches`.
        """
        losses = losses[: len(self._kind)].double()
        means = [losses[self._kind == number].mean() for number in range(len(self.kinds))]
        return float(losses.mean()), dict(zip(self.kinds, torch.stack(means).tolist()))


def _stream(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype="<u2").view(np.int16))


def _windows(stream: Tensor, length: int) -> Tensor:
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def _numbers(windows: Tensor) -> Tensor:
    return windows.long() & 0xFFFF
