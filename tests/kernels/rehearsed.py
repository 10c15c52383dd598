"""Run by ``test_rehearsal.py`` in a process of its own: which kernels of ours are compiled, or read from disk, and when."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import nn

import poetx_compile
from poetx_compile.kernels import rehearsal


def ours(compiled: list[Any]) -> list[str]:
    return [function.__name__ for function in compiled if function.__module__.startswith("poetx_compile.")]


def first_step(storage: str, width: int) -> None:
    compiled: list[Any] = []

    def note(*, src: Any, **others: Any) -> None:
        compiled.append(src.fn)

    triton.knobs.compilation.listener = note
    layers = nn.Sequential(nn.Linear(4 * width, 8 * width), nn.GELU(), nn.Linear(8 * width, 4 * width, bias=False))
    model = layers.to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(333, 4 * width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    options = {"storage": storage, "block_size": width}
    poetx_compile.prepare(model, x, options=options)
    rehearsal.join()
    before = ours(compiled)
    print("rehearsed", before)
    assert {"_gram_kernel", "_pack_kernel", "_far_kernel"} < set(before)
    compiled.clear()
    F.mse_loss(torch.compile(model, backend="poetx", options=options)(x), x.detach()).backward()
    optimizer.step()
    torch.cuda.synchronize()
    print("compiled in the step", ours(compiled))
    assert not ours(compiled)


def leave() -> None:
    """End while a thread compiles a kernel for a GPU that need not be here."""
    from test_triton import FIXED, compiled

    started = threading.Event()

    def compile_far(kind: Any) -> None:
        started.set()
        compiled("sm90", *FIXED["far"])

    rehearsal.PARTS = (compile_far,)
    rehearsal.fits = lambda tensor, *widths: True
    side = rehearsal.Side(16, 1, 16, 16)
    kind = rehearsal.Kind(torch.device("cpu"), torch.float32, side, side, "ieee", None, 8, True)
    rehearsal.start(kind._replace(residual_bits=bits) for bits in (8, 4, 0))
    started.wait()
    (thread,) = rehearsal._running
    thread.join(1.0)
    print("compiling" if thread.is_alive() else "done")


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        leave()
    else:
        first_step(sys.argv[1], int(sys.argv[2]))
