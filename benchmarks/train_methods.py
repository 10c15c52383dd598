"""The methods of the whole-model benchmark: each makes a model ready to train, as its authors tell users to."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llama import Size, hidden_and_other
from model_floors import Load, StepFloor
from official import RefusalError, import_official
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from poetx_compile.registry import factors

RATE = 1e-4
"""Learning rate of every method: small, so that nothing diverges. Time does not depend on it."""

_SEEN_BY_MEDIAN = 2
"""What comes once in so many steps, or more often, is in the median step."""


@dataclass(frozen=True)
class Rare:
    """Work that belongs to training, but is not done at every step.

    Attributes:
        period: steps from one time to the next.
        run: does it once; None where the first optimizer step does it beside its own work.
    """

    what: str
    period: int
    run: Callable[[], object] | None = None


class MarkedAdamW(AdamW):
    """AdamW that calls ``mark`` once its own arithmetic is launched, before hooks fold rotations."""

    mark: Callable[[], object] | None = None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.mark is not None:
            self.mark()
        return loss


@dataclass
class Trainer:
    """A model that is ready to train.

    Attributes:
        module: holds all parameters.
        forward: what is called; gives an output with ``loss``.
        folding: the optimizer after whose arithmetic rotations are folded.
    """

    module: nn.Module
    forward: Callable[..., Any]
    optimizers: list[Optimizer]
    folding: MarkedAdamW | None = None
    rare: Rare | None = None
    note: str = ""

    def loss(self, ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.forward(input_ids=ids, labels=ids, use_cache=False).loss

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@dataclass(frozen=True)
class Spec:
    """A method with its options, as on the command line: ``NAME:option=value:...``.

    Attributes:
        mode: of ``torch.compile``.
        compiler: ``inductor``, or ``aot_eager`` for debugging.
        official: the folder that holds ``poet_torch``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    compiler: str = "inductor"
    official: Path | None = None

    @classmethod
    def parse(cls, text: str, compiler: str = "inductor", official: Path | None = None) -> Spec:
        """Raises:
        ValueError: no such method, or an option that it does not take.
        """
        name, *parts = text.split(":")
        if name not in METHODS:
            raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
        options = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: {part!r} is no option=value")
            options[key] = _value(value)
        mode = options.pop("mode", None)
        defaults = METHODS[name].defaults
        if unknown := [key for key in options if key not in defaults and not METHODS[name].takes_any]:
            raise ValueError(f"{text!r}: {name} takes {', '.join(('mode', *defaults))}, not {', '.join(unknown)}")
        for key, value in options.items():
            if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
                raise ValueError(f"{text!r}: {key} is True or False, not {value!r}")
        return cls(name, options, mode, compiler, official)

    def __getitem__(self, option: str) -> Any:
        return self.options.get(option, METHODS[self.name].defaults[option])

    def floor(self, load: Load) -> StepFloor:
        return METHODS[self.name].floor(self, load)

    @property
    def backend_options(self) -> dict[str, Any]:
        """Those that ``torch.compile`` is given; the others are the benchmark's."""
        return {key: value for key, value in self.options.items() if key not in _OF_THE_USER}

    def configured(self, model: nn.Module) -> nn.Module:
        """The model as its user sets it, before anything of the method comes to it."""
        if self.options.get("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def trainer(self, model: nn.Module, size: Size) -> Trainer:
        """Convert and compile a model, and make its optimizer.

        Raises:
            RefusalError: what the method needs is not there.
        """
        return METHODS[self.name].make(self, self.configured(model), size)


@dataclass(frozen=True)
class Method:
    """How a method is made, and what it must do at least.

    Attributes:
        defaults: of its options.
        takes_any: whether it takes options without a default here, and checks them itself.
    """

    make: Callable[[Spec, nn.Module, Size], Trainer]
    floor: Callable[[Spec, Load], StepFloor]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_any: bool = False


def poetx(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    inner = {} if spec.compiler == "inductor" else {"inner": spec.compiler}
    compiled = _compiled(spec, model, "poetx", {**spec.backend_options, **inner} or None)
    optimizer = MarkedAdamW(model.parameters(), lr=RATE, fused=True)
    period = spec.options.get("permutation_period", 0)
    rare = Rare("new permutations", period, lambda: _draw(model)) if period > _SEEN_BY_MEDIAN else None
    return Trainer(model, compiled, [optimizer], optimizer, rare)


def _draw(model: nn.Module) -> None:
    for factor in factors.of_module(model):
        factor.draw()


def adamw(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    return Trainer(model, _compiled(spec, model), [AdamW(model.parameters(), lr=RATE, fused=True)])


def adafactor(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    return Trainer(model, _compiled(spec, model), [torch.optim.Adafactor(model.parameters(), lr=RATE)])


def torchao_adamw(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    package = _package("torchao", "torchao.optim")
    return Trainer(model, _compiled(spec, model), [package.AdamW8bit(model.parameters(), lr=RATE)])


def bitsandbytes_adamw(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    package = _package("bitsandbytes")
    return Trainer(model, _compiled(spec, model), [package.optim.AdamW8bit(model.parameters(), lr=RATE)])


def muon(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    inside, outside = hidden_and_other(model)
    optimizers = [torch.optim.Muon(inside, lr=RATE), AdamW(outside, lr=RATE, fused=True)]
    return Trainer(model, _compiled(spec, model), optimizers)


def lora(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    package = _package("peft")
    config = package.LoraConfig(r=spec["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = package.get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return Trainer(adapted, _compiled(spec, adapted), [AdamW(trained, lr=RATE, fused=True)], note="adapters in bfloat16")


def galore(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    package = _package("galore_torch")
    return _low_rank(spec, model, package.GaLoreAdamW, rank=_quarter(spec, size), update_proj_gap=spec["gap"], scale=0.25)


def apollo(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    package = _package("apollo_torch")
    settings = {"proj": "random", "scale_type": "channel", "scale": 1}
    return _low_rank(spec, model, package.APOLLOAdamW, rank=spec["rank"], update_proj_gap=spec["gap"], **settings)


def official(spec: Spec, model: nn.Module, size: Size) -> Trainer:
    """As the authors' training script does: convert, then ``torch.compile`` all; ``-eager`` as their README does."""
    if spec.official is None:
        raise RefusalError("needs --official DIR, a checkout of github.com/Sphere-AI-Lab/poet")
    package: Any = import_official(spec.official)
    lean = spec.name.startswith("official-mem")
    config = package.POETConfig(
        block_size=spec["block_size"], merge_interval=spec["merge_interval"], mem_efficient_mode=lean
    )
    wrapped = package.POETModel(model, config)
    forward = wrapped if spec.name.endswith("-eager") else _compiled(spec, wrapped)
    optimizer = package.get_poet_optimizer(wrapped, config)
    return Trainer(wrapped, forward, [optimizer], rare=Rare("merge", spec["merge_interval"], wrapped.merge))


def _low_rank(spec: Spec, model: nn.Module, optimizer: Callable[..., Optimizer], **settings: Any) -> Trainer:
    inside, outside = hidden_and_other(model)
    groups = [{"params": outside}, {"params": inside, "proj_type": "std", **settings}]
    made = optimizer(groups, lr=RATE, no_deprecation_warning=True)
    rare = Rare("new projections, with the first states", spec["gap"])
    return Trainer(model, _compiled(spec, model), [made], rare=rare)


def _quarter(spec: Spec, size: Size) -> int:
    return spec["rank"] or size.hidden // 4


def _compiled(
    spec: Spec, model: nn.Module, backend: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The model compiled as a whole, or where the spec says ``regional`` each decoder layer by itself."""
    settings: dict[str, Any] = {"backend": backend or spec.compiler, "mode": spec.mode, "options": options}
    if not spec.options.get("regional"):
        return torch.compile(model, **settings)
    for layer in model.get_submodule("model.layers").children():
        layer.compile(**settings)
    return model


def _package(name: str, module: str | None = None) -> Any:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise RefusalError(f"not installed: {name}") from None
        raise
    return importlib.import_module(module or name)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _poetx_floor(spec: Spec, load: Load) -> StepFloor:
    return load.poetx(spec["block_size"], spec.options.get("updates", "orthogonal") == "orthogonal")


def _official_floor(spec: Spec, load: Load) -> StepFloor:
    return load.official(spec["block_size"], spec.name.startswith("official-mem"), spec["merge_interval"])


_BLOCKS = {"block_size": 256}
_OF_THE_USER = {"checkpointing": False, "regional": False}
"""Options of the benchmark itself: what a user sets on the model, and how it is compiled."""

_OFFICIAL = Method(official, _official_floor, {**_BLOCKS, "merge_interval": 200})

METHODS = {
    "poetx": Method(poetx, _poetx_floor, {**_BLOCKS, **_OF_THE_USER}, takes_any=True),
    "adamw": Method(adamw, lambda _, load: load.adamw(), _OF_THE_USER),
    "muon": Method(muon, lambda _, load: load.muon()),
    "adamw8bit": Method(torchao_adamw, lambda _, load: load.eight_bit_adamw()),
    "adamw8bit-bnb": Method(bitsandbytes_adamw, lambda _, load: load.eight_bit_adamw()),
    "adafactor": Method(adafactor, lambda _, load: load.adafactor()),
    "lora": Method(lora, lambda spec, load: load.lora(spec["r"]), {"r": 160}),
    "galore": Method(galore, lambda spec, load: load.low_rank(_quarter(spec, load.size), True), {"rank": 0, "gap": 200}),
    "apollo": Method(apollo, lambda spec, load: load.low_rank(spec["rank"], False), {"rank": 256, "gap": 200}),
    "official-fast": _OFFICIAL,
    "official-mem": _OFFICIAL,
    "official-fast-eager": _OFFICIAL,
    "official-mem-eager": _OFFICIAL,
}
