"""``python -m poetx_compile doctor``: does this installation train as it should on this machine?"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from .machine import version
from .registry import factors

Check = Callable[[], str]


def run(inner: str = "inductor", console: Console | None = None) -> bool:
    """Run all checks, print a line for each, and tell whether all passed.

    Args:
        inner: the inner compiler; ``aot_eager`` needs no C++ compiler.
    """
    console = console or Console()
    checks: dict[str, Check] = {
        "python": platform.python_version,
        "torch": _torch,
        "triton": _triton,
        "device": _device,
        "backend": _registration,
        "training step": lambda: training_step(_best_device(), inner),
    }
    passed = True
    for name, check in checks.items():
        try:
            console.print(f"[green]ok[/]    {name}: {check()}", highlight=False)
        except Exception as error:
            passed = False
            console.print(f"[red]FAIL[/]  {name}: {error}", highlight=False)
    return passed


def training_step(device: torch.device, inner: str = "inductor") -> str:
    """Compile a small model, take one AdamW step, and compare all of it with what the method says.

    Raises:
        RuntimeError: a difference, and where.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.LayerNorm(48), nn.Linear(48, 32)).to(device)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    before = [weight.detach().double() for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="poetx", options={"inner": inner, "block_size": 32})
    x, target = torch.randn(64, 48, device=device), torch.randn(64, 32, device=device)

    raw = model(x)
    dense = torch.autograd.grad(F.mse_loss(raw, target), weights)
    output = compiled(x)
    _close("output of the compiled model", output, raw)
    F.mse_loss(output, target).backward()
    for index, (weight, gradient) in enumerate(zip(weights, dense)):
        factor = factors.of_weight(weight)
        if factor is None:
            raise RuntimeError(f"the weight of linear layer {index} was not converted")
        _close(f"gradient of rotation {index}", factor.q.grad, factor.project(gradient))
    optimizer.step()
    optimizer.zero_grad()
    for index, (weight, start) in enumerate(zip(weights, before)):
        if torch.equal(weight.double(), start):
            raise RuntimeError(f"the weight of linear layer {index} did not move")
        _close(f"singular values {index}", torch.linalg.svdvals(weight.double()), torch.linalg.svdvals(start))
    _close("output after the step", compiled(x), model(x))
    return f"{len(weights)} layers rotated on {device}, compiled by {inner}; outputs, gradients and singular values agree"


def _close(what: str, actual: torch.Tensor | None, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    if actual is None:
        raise RuntimeError(f"{what}: missing")
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < tolerance:
        raise RuntimeError(f"{what}: relative error {error:.1e}, expected less than {tolerance:.0e}")


def _torch() -> str:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 11):
        raise RuntimeError(f"{torch.__version__}, but poetx needs 2.11 or newer: pip install --upgrade torch")
    return torch.__version__


def _triton() -> str:
    installed = version("triton")
    if installed is None and torch.cuda.is_available():
        raise RuntimeError("missing, but this machine has a GPU: pip install triton")
    return installed or "not installed (needed on a GPU only)"


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


def _registration() -> str:
    if "poetx" not in torch._dynamo.list_backends():
        raise RuntimeError("torch.compile does not know 'poetx'; the source folder is not enough: pip install .")
    return "registered as 'poetx'"
