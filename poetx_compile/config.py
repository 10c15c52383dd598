"""What a user can set, checked when it is set."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ._torch.compilers import inductor_modes, inductor_option_names, inductor_option_type
from .errors import PoetxError, PoetxWarning
from .layout import automatic_chunk

ROUTES = ("auto", "gram", "dense")
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32")
INNER = ("inductor", "aot_eager")
RESIDUAL_BITS = (8, 4, 0)
STORAGES = ("folded", "int8", "bf16-lean")
SKEW_DTYPES = ("float32", "bfloat16")
SIDES = ("both", "rows", "columns")
INITS = ("keep", "row-normalised")
UPDATES = ("orthogonal", "given")
MOMENTS = ("reset", "keep", "second", "transport")
HEADS = ("lm_head", "head", "heads", "classifier", "score", "embed_out", "output_projection")

_MOVABLE = frozenset({"storage", "skew_dtype", "activation_memory_budget"})
_CHOICES: dict[str, tuple[Any, ...]] = {
    "residual_bits": RESIDUAL_BITS,
    "storage": STORAGES,
    "skew_dtype": SKEW_DTYPES,
    "sides": SIDES,
    "init": INITS,
    "updates": UPDATES,
    "moments": MOMENTS,
    "route": ROUTES,
    "precision": PRECISIONS,
    "inner": INNER,
}


@dataclass(frozen=True)
class PoetxConfig:
    """Settings of the backend; every field can stand in ``torch.compile(..., options={...})``.

    Raises:
        PoetxError: a value is of the wrong type or out of range.
    """

    block_size: int = 256
    """Largest block of channels that one orthogonal factor rotates. Larger: more freedom, more memory for ``q``."""

    chunk: int = 0
    """Channels that a permutation moves together. 1 is the papers' uniform permutation; 0 takes a power of two up to 64
    that fits the blocks and the dimension, so that reads are coalesced: see :func:`.layout.automatic_chunk`."""

    scale: float = 1.0
    """``s``: a block's skew matrix is ``s`` times what the optimizer wrote. Sets how fast rotations learn."""

    sides: str = "both"
    """Which sides of a weight rotate: ``both``, or only the ``rows`` or the ``columns`` of it as it is stored."""

    updates: str = "orthogonal"
    """What a step turns by: what the optimizer wrote (``given``), or the same brought near one angle for all channels of a block
    (``orthogonal``: see :func:`.kernels.polar.spread_in_torch`). :class:`.optim.SkewMuon` does so itself, whatever stands here."""

    permutation_period: int = 0
    """Optimizer steps until new permutations are drawn; 0 keeps the first."""

    moments: str = "reset"
    """What the optimizer keeps of ``q`` when permutations are drawn: nothing, or what :func:`.moments.carried` says."""

    seed: int = 0
    """Permutations depend on (seed, parameter name, number of the draw) only."""

    residual_bits: int = 8
    """Of half-precision weights: how many bits below their 16 are kept, 8, 4 or 0. With 0 each fold rounds stochastically."""

    storage: str = "folded"
    """Of half-precision weights of linear layers: ``folded``, each step goes into the weight; or a base and the rotations since,
    ``int8`` (one byte a number) or ``bf16-lean`` (two)."""

    skew_dtype: str = "float32"
    """Of ``q`` of half-precision weights, its gradient and its optimizer states: ``float32``, or ``bfloat16`` for half of it."""

    activation_memory_budget: float = 1.0
    """Share of the activations that a compiled graph may save for its backward, from 0 to 1; it computes the others again."""

    memory: float | str = 0.0
    """What a training step may take, in gigabytes of 10⁹ bytes, or ``auto`` for what the card has; 0 for no limit. Settings among
    :attr:`movable` are then those that :mod:`.ladder` finds to fit."""

    init: str = "keep"
    """What a conversion does to a weight's values: nothing, or for pretraining from scratch ``row-normalised``, which divides the
    weights of each output by their norm. It changes the model's function."""

    exclude: tuple[str, ...] = ()
    """Weights to leave alone: ``fnmatch`` patterns on the whole name, or one component of it (``"gate"``)."""

    heads: tuple[str, ...] = HEADS
    """Names of modules that are output heads, where :func:`.passes.match.is_head` says so. Heads are trained as before."""

    include_conv: bool = False
    """Whether kernels of convolutions rotate too, each as a matrix ``[out, in · k · k]``. Grouped ones never do."""

    route: str = "auto"
    """How gradients of ``q`` are made: ``gram`` from activations, ``dense`` from the weight's gradient, or ``auto``."""

    precision: str = "auto"
    """Of the products that make and apply rotations on a GPU: ``ieee``, ``tf32x3``, ``tf32``, or ``auto`` by weight."""

    inner: str = "inductor"
    """What compiles the rewritten graph: ``inductor``, or ``aot_eager`` for debugging."""

    _named: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(PoetxConfig):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                value = self._names(field.name, value)
            elif isinstance(field.default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(field.default) and field.name != "memory":
                expected = type(field.default).__name__
                raise PoetxError(f"poetx: option {field.name!r} must be {expected}, not {value!r}")
            object.__setattr__(self, field.name, value)
        self._check_numbers()
        self._check_memory()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(str, choices))
                raise PoetxError(f"poetx: option {name!r} must be one of {allowed}, not {getattr(self, name)!r}")
        self._check_storage()

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> PoetxConfig:
        """Settings that remember which of them were named, so that ``memory`` leaves these alone."""
        config = cls(**options)
        object.__setattr__(config, "_named", frozenset(options))
        return config

    @property
    def movable(self) -> frozenset[str]:
        """What ``memory`` may choose: no option that was named, and no field that is not at its default."""
        defaults = {field.name: field.default for field in dataclasses.fields(PoetxConfig)}
        open_ = {name for name in _MOVABLE - self._named if getattr(self, name) == defaults[name]}
        return frozenset(open_ if self.route != "dense" and self.residual_bits == 8 else open_ - {"storage"})

    def _check_memory(self) -> None:
        if self.memory != "auto" and not (type(self.memory) is float and 0 <= self.memory < float("inf")):
            raise PoetxError(
                f"poetx: option 'memory' must be 'auto', or gigabytes such as 24.0 (0 for no limit), not {self.memory!r}"
            )

    def _check_storage(self) -> None:
        if self.storage != "folded" and self.route == "dense":
            raise PoetxError(
                f"poetx: storage={self.storage!r} keeps no whole weights, which route='dense' would; leave route at 'auto'"
            )
        if self.storage != "folded" and self.residual_bits != 8:
            raise PoetxError(
                f"poetx: residual_bits says nothing of storage={self.storage!r}, only of 'folded'; leave it out"
            )

    @staticmethod
    def _names(name: str, value: Any) -> tuple[str, ...]:
        names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
        if not all(isinstance(item, str) for item in names):
            raise PoetxError(f"poetx: option {name!r} must be a list of names, not {value!r}")
        return names

    def _check_numbers(self) -> None:
        chunk = self.chunk or automatic_chunk(self.block_size)
        if chunk < 1:
            raise PoetxError(f"poetx: option 'chunk' must be 1 or more, or 0 for one that fits, not {chunk}")
        if self.block_size < 2 or self.block_size % chunk:
            least = max(chunk, 2)
            down = self.block_size // chunk * chunk
            nearest = f"the nearest are {down} and {down + chunk}" if down >= least else f"the nearest is {least}"
            raise PoetxError(
                f"poetx: block_size {self.block_size} is impossible: it must be a multiple of chunk ({chunk}) and at "
                f"least 2; {nearest}" + (", or set chunk=1" if chunk > 1 else "")
            )
        if not 0 < self.scale < float("inf"):
            raise PoetxError(f"poetx: option 'scale' must be positive and finite, not {self.scale}")
        if not 0 <= self.activation_memory_budget <= 1:
            raise PoetxError(
                f"poetx: option 'activation_memory_budget' must be from 0 to 1, not {self.activation_memory_budget}"
            )
        if self.permutation_period < 0:
            raise PoetxError(f"poetx: option 'permutation_period' must be 0 or more, not {self.permutation_period}")
        if self.permutation_period and chunk == self.block_size:
            warnings.warn(
                f"poetx: new permutations move {chunk} channels together, which are whole blocks of block_size={self.block_size}: "
                "where these divide a dimension, no channel meets another block. Pass a smaller chunk",
                PoetxWarning,
                stacklevel=2,
            )


def split_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[PoetxConfig, dict[str, Any]]:
    """Part ``torch.compile``'s ``options`` and ``mode`` into our settings and Inductor's.

    Raises:
        PoetxError: an option or a mode that neither knows, with the closest match or the choices; a value of the wrong type.
    """
    ours = {field.name for field in dataclasses.fields(PoetxConfig)}
    inductors = inductor_option_names()
    modes = inductor_modes()
    if mode and mode not in modes:
        raise PoetxError(f"poetx: unknown mode {mode!r}; torch.compile knows {', '.join(modes)}")
    patches = dict(modes[mode]) if mode else {}
    settings: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name in ours:
            settings[name] = value
        elif (option := str(name).replace("-", "_")) in inductors:
            expected = inductor_option_type(option)
            if expected and not isinstance(value, expected):
                raise PoetxError(f"poetx: Inductor's option {name!r} must be {expected.__name__}, not {value!r}")
            patches[option] = value
        else:
            close = difflib.get_close_matches(str(name), sorted(ours | inductors), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; poetx knows {', '.join(sorted(ours))}"
            raise PoetxError(f"poetx: unknown option {name!r}{hint}")
    config = PoetxConfig.of_options(settings)
    if patches and config.inner == "aot_eager":
        warnings.warn(
            f"poetx: inner='aot_eager' takes no Inductor options; left out: {', '.join(patches)}", PoetxWarning, stacklevel=2
        )
    return config, patches
