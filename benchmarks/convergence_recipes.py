"""The recipes of the convergence benchmark: a training method, its settings, and what the settings stand for."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llama import Size, build, hidden_and_other
from official import RefusalError, import_official
from torch import nn
from torch.optim import AdamW, Optimizer

from poetx_compile import PoetxConfig, PoetxError
from poetx_compile.config import split_options
from poetx_compile.optim import SkewMuon

SIZES = {
    "tiny": Size(64, 128, 2, 2, 512),
    "60m": Size(512, 1280, 8, 8),
    "130m": Size(768, 2048, 12, 12),
    "350m": Size(1024, 2736, 24, 16),
}

DTYPES = {
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
    "fp32": (torch.float32, False),
}
"""Of the weights, and whether products are made in bfloat16 beside that."""

COMMON: Mapping[str, Any] = {
    "lr": 0.0,
    "dtype": "bf16",
    "std": 0.0,
    "gain": 1.0,
    "spectrum": "random",
    "gains": "none",
    "warmup": 100,
    "floor": 0.1,
    "clip": 1.0,
}
"""Settings that every method takes. ``std`` is that of the initial weights, 0 for ``hidden ** -0.5``, and
``gain`` multiplies those of the layers' matrices. ``spectrum`` sets the shape of their singular values, at the same norm. ``gains``
are trained factors of the outputs of each layer's linears: one for each output (``rows``), one for all (``layer``) or ``none``.
``floor`` is the last learning rate over the highest."""

SPECTRA = {"random": None, "flat": 0.0, "linear": 1.0, "square": 2.0, "cube": 3.0}
"""The power with which singular values fall along their order, from the largest to nothing; ``random`` leaves them as drawn."""

ADAMW: Mapping[str, Any] = {"beta2": 0.999, "weight_decay": 0.01}
"""Settings of methods of which AdamW is a part, for whatever it trains."""


@dataclass
class Trained:
    """A model that is ready to train.

    Attributes:
        module: holds all parameters; called as it is for validation.
        forward: what is called in training.
        after_step: what follows each step, given the number of steps made.
        resumed: what follows the loading of a checkpoint, given the number of steps made.
    """

    module: nn.Module
    forward: Callable[..., Any]
    optimizers: list[Optimizer]
    after_step: Callable[[int], object] = lambda step: None
    resumed: Callable[[int], object] = lambda step: None


@dataclass(frozen=True)
class Recipe:
    """``METHOD:option=value:...``: in alphabetical order the learning rate, and the options that are not the default."""

    method: str
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Raises:
        ValueError: no such method, an option that it does not take, or a value that cannot be.
        """
        name, *parts = text.split(":")
        if name not in METHODS:
            raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
        method = METHODS[name]
        options: dict[str, Any] = {"lr": method.lr}
        for part in parts:
            option, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: {part!r} is no option=value")
            options[option] = _value(value)
        known = {**COMMON, **method.defaults}
        if unknown := [option for option in options if option not in known and not method.takes_any]:
            raise ValueError(f"{text!r}: {name} takes {', '.join(known)}, not {', '.join(unknown)}")
        defaults = {**(asdict(PoetxConfig()) if method.takes_any else {}), **known}
        exact = {
            option: float(value) if _is_whole(value, defaults.get(option)) else value for option, value in options.items()
        }
        told = [(option, value) for option, value in exact.items() if option == "lr" or defaults.get(option) != value]
        recipe = cls(name, tuple(sorted(told)))
        try:
            split_options(recipe.others, mode=None)
        except PoetxError as error:
            raise ValueError(f"{text!r}: {error}") from error
        for option, values in (("dtype", DTYPES), ("spectrum", SPECTRA), ("gains", ("none", "rows", "layer"))):
            if recipe[option] not in values:
                raise ValueError(f"{text!r}: {option} is one of {', '.join(values)}, not {recipe[option]!r}")
        if not recipe["lr"] > 0:
            raise ValueError(f"{text!r}: lr must be positive, not {recipe['lr']!r}")
        return recipe

    def __str__(self) -> str:
        return ":".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    def __getitem__(self, option: str) -> Any:
        return dict(self.options).get(option, {**COMMON, **METHODS[self.method].defaults}.get(option))

    @property
    def family(self) -> str:
        """The recipe without its learning rate."""
        return str(Recipe(self.method, tuple(pair for pair in self.options if pair[0] != "lr")))

    @property
    def others(self) -> dict[str, Any]:
        """The options that are the backend's own."""
        return {name: value for name, value in self.options if name not in {**COMMON, **METHODS[self.method].defaults}}

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if DTYPES[self["dtype"]][1] else nullcontext()

    def make(self, place: Place) -> Trained:
        """Build the model with the weights of the seed, compile it, and make its optimizers.

        Raises:
            RefusalError: what the method needs is not there.
        """
        dtype, _ = DTYPES[self["dtype"]]
        start = build(place.size, place.length, place.device, torch.float32, place.seed, self["std"] or None)
        model = build(place.size, place.length, place.device, dtype)
        for matrix in hidden_and_other(start)[0]:
            reshape(matrix, self["gain"], self["spectrum"])
        model.load_state_dict(start.state_dict())
        if self["gains"] != "none":
            train_gains(model, self["gains"])
        return METHODS[self.method].make(self, model, place)


@dataclass(frozen=True)
class Place:
    """What a recipe meets: the model's dimensions, windows of ``length`` tokens, and the machine.

    Attributes:
        compiler: ``inductor``, or ``aot_eager`` for debugging.
        official: a checkout of the authors' code.
    """

    size: Size
    length: int
    device: torch.device
    seed: int = 0
    compiler: str = "inductor"
    official: Path | None = None

    @property
    def is_fused(self) -> bool:
        return self.device.type == "cuda"

    @property
    def inner(self) -> dict[str, str]:
        return {} if self.compiler == "inductor" else {"inner": self.compiler}


@dataclass(frozen=True)
class Method:
    """How a method is made.

    Attributes:
        lr: its learning rate where none is given.
        defaults: of the options that others do not have.
        takes_any: whether it takes the backend's options too, which checks them itself.
    """

    make: Callable[[Recipe, nn.Module, Place], Trained]
    lr: float
    defaults: Mapping[str, Any]
    takes_any: bool = False


@torch.no_grad()
def reshape(matrix: nn.Parameter, gain: float, spectrum: str) -> None:
    """Multiply a matrix by ``gain``; give it singular values of the shape of ``spectrum``, at the same norm."""
    power = SPECTRA[spectrum]
    if power is not None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        places = torch.arange(len(values), device=matrix.device) + 0.5
        wanted = (1 - places / len(values)) ** power
        matrix.copy_((left * (wanted * values.norm() / wanted.norm())) @ right)
    matrix *= gain


def train_gains(model: nn.Module, kind: str) -> None:
    """Multiply the outputs of the linears in the model's layers by trained factors, which begin at 1."""

    def multiplied(linear: nn.Linear, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * linear.gain.to(output.dtype)

    for name, linear in list(model.named_modules()):
        if ".layers." in name and isinstance(linear, nn.Linear):
            count = linear.out_features if kind == "rows" else 1
            linear.gain = nn.Parameter(torch.ones(count, device=linear.weight.device))
            linear.register_forward_hook(multiplied)


def adamw_over(recipe: Recipe, parameters: Iterable[nn.Parameter] | list[dict[str, Any]], place: Place) -> AdamW:
    betas, decay = (0.9, recipe["beta2"]), recipe["weight_decay"]
    return AdamW(parameters, lr=recipe["lr"], betas=betas, weight_decay=decay, fused=place.is_fused or None)


def poetx(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    compiled = torch.compile(model, backend="poetx", options={**recipe.others, **place.inner} or None)
    return Trained(model, compiled, [adamw_over(recipe, model.parameters(), place)])


def poetx_muon(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    compiled = torch.compile(model, backend="poetx", options={**recipe.others, **place.inner} or None)
    optimizer = SkewMuon(
        model.parameters(),
        lr=recipe["lr"],
        momentum=recipe["momentum"],
        nesterov=recipe["nesterov"],
        adjust_lr_fn=recipe["adjust"],
        betas=(0.9, recipe["beta2"]),
        weight_decay=recipe["weight_decay"],
        fused=place.is_fused or None,
    )
    return Trained(model, compiled, [optimizer])


def adamw(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    """With ``ratio`` times the rate for the matrices of the layers."""
    matrices, others = hidden_and_other(model)
    optimizer = adamw_over(recipe, [{"params": others}, {"params": matrices, "lr": recipe["lr"] * recipe["ratio"]}], place)
    return Trained(model, torch.compile(model, backend=place.compiler), [optimizer])


def muon(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    """torch's own, for the matrices of the layers; its rate is ``ratio`` times that of AdamW for the rest."""
    inside, outside = hidden_and_other(model)
    matrices = torch.optim.Muon(
        inside,
        lr=recipe["lr"] * recipe["ratio"],
        momentum=recipe["momentum"],
        weight_decay=recipe["matrix_decay"],
        adjust_lr_fn=recipe["adjust"],
    )
    compiled = torch.compile(model, backend=place.compiler)
    return Trained(model, compiled, [matrices, adamw_over(recipe, outside, place)])


def sgd(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe["lr"], momentum=recipe["momentum"], nesterov=recipe["nesterov"]
    )
    return Trained(model, torch.compile(model, backend=place.compiler), [optimizer])


def official(recipe: Recipe, model: nn.Module, place: Place) -> Trained:
    """The authors' layers, optimizer and merges; their rotations' rate is ``ratio`` times that of the rest."""
    if place.official is None:
        raise RefusalError("needs --official DIR, a checkout of github.com/Sphere-AI-Lab/poet")
    package: Any = import_official(place.official)
    config = package.POETConfig(
        block_size=recipe["block_size"],
        merge_interval=recipe["merge_interval"],
        base_lr=recipe["lr"],
        poet_lr=recipe["lr"] * recipe["ratio"],
    )
    wrapped = package.POETModel(model, config)
    optimizer = package.get_poet_optimizer(wrapped, config)

    def resumed(step: int) -> None:
        optimizer.global_step_counter = step  # their state_dict leaves it out

    compiled = torch.compile(wrapped, backend=place.compiler)
    return Trained(wrapped, compiled, [optimizer], wrapped.merge_if_needed, resumed)


def _is_whole(value: Any, default: Any) -> bool:
    """Whether an integer stands for a number like the default."""
    return type(value) is int and type(default) is float


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


METHODS = {
    "poetx": Method(poetx, 2e-3, ADAMW, takes_any=True),
    "poetx-muon": Method(
        poetx_muon, 2e-3, {**ADAMW, "momentum": 0.95, "nesterov": True, "adjust": "match_rms_adamw"}, takes_any=True
    ),
    "adamw": Method(adamw, 1e-3, {**ADAMW, "ratio": 1.0}),
    "muon": Method(muon, 1e-3, {**ADAMW, "ratio": 1.0, "momentum": 0.95, "matrix_decay": 0.1, "adjust": "match_rms_adamw"}),
    "sgd": Method(sgd, 0.1, {"momentum": 0.9, "nesterov": True}),
    "official": Method(official, 1e-3, {"block_size": 256, "merge_interval": 200, "ratio": 0.5}),
}
