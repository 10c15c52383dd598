"""A folder of text as one stream of bytes, some of its files held out. Python's own source serves where none is given."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
START = 0
"""The byte that begins each file: text does not contain it."""

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_HELD_OUT = 0.05


class Corpus:
    """Training and validation text, and the batches cut from them.

    Attributes:
        train, validation: uint8, all files of each part one after the other.
        fingerprint: stands for all of the text.
    """

    def __init__(self, root: Path | None = None) -> None:
        """Read every text file below ``root``; if it is None, the modules of the standard library without their tests.

        Raises:
            ValueError: there is no such folder, or too little text in it.
        """
        if root is None:
            root = Path(sysconfig.get_paths()["stdlib"])
            paths = [path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
        elif root.is_dir():
            paths = [path for path in root.rglob("*") if path.is_file()]
        else:
            raise ValueError(f"the corpus folder {root} does not exist")
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}
        files = {name: text for name, text in files.items() if text and START not in text}
        if len(files) < 2:
            raise ValueError(
                f"{root} has {len(files)} text files; it takes two at least, one to train on and one to validate"
            )
        held_out = {name for name in files if _draw(name) < _HELD_OUT} or {min(files, key=_draw)}
        self.train = _stream([text for name, text in files.items() if name not in held_out])
        self.validation = _stream([text for name, text in files.items() if name in held_out])
        digest = hashlib.sha256(self.train.numpy())
        digest.update(self.validation.numpy())
        self.fingerprint = digest.hexdigest()[:12]

    def batch(self, seed: int, step: int, size: int, length: int) -> Tensor:
        """The training windows of one step, int64 ``[size, length]``; they depend on nothing but the arguments."""
        generator = torch.Generator().manual_seed(int(_draw(f"{seed}:{step}") * 2**48))
        return _windows(self.train, torch.randint(len(self.train) - length + 1, (size,), generator=generator), length)

    def validation_batches(self, count: int, size: int, length: int) -> list[Tensor]:
        """Windows spread evenly over the held-out text, the same ones at every call."""
        starts = torch.linspace(0, len(self.validation) - length, count * size, dtype=torch.float64).long()
        return [_windows(self.validation, part, length) for part in starts.split(size)]


def encode(text: str) -> list[int]:
    return [START, *text.encode()]


def decode(tokens: list[int]) -> str:
    """Text for a terminal: what is neither printable nor white space becomes a replacement character."""
    text = bytes(tokens).decode(errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _stream(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(bytes([START]) + text for text in texts)), dtype=torch.uint8)


def _windows(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    return stream[starts[:, None] + torch.arange(length)].long()


def _draw(name: str) -> float:
    """A number in [0, 1) that always belongs to this name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
