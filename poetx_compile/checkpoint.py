"""Exact resume by the plain idiom: what ``optimizer.state_dict()`` says of a converted weight, and how it is read back.

``Optimizer.load_state_dict`` casts every floating tensor to the dtype of the parameter it finds: a float32 moment of a
bfloat16 weight would lose 16 bits. Such tensors leave as uint8 bytes, which any cast keeps. Entries are flat, and hold
numbers and tensors only, so that ``torch.load(weights_only=True)`` and distributed checkpoints take them.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._torch.optimizers import explain_failed_loads
from .config import SIDES, SKEW_DTYPES, STORAGES, UPDATES, PoetxConfig
from .errors import PoetxError, PoetxWarning
from .factor import OrthogonalFactor
from .fingerprint import fingerprint
from .kernels import HALF
from .layout import StackLayout
from .registry import factors

Entry = dict[str, Any]

_PREFIX = "poetx_"
_CODE = "poetx_code_"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SETTINGS = ("block_size", "chunk", "scale", "residual_bits", "storage", "skew_dtype", "sides", "updates")
_WORDS = {"storage": STORAGES, "skew_dtype": SKEW_DTYPES, "sides": SIDES, "updates": UPDATES}
_UNNAMED = {"updates": "given"}
"""What checkpoints that do not name a setting were trained with, where that is not the default now."""
_KEPT = ("residual", "stored", "scales", "turned_rows", "turned_columns")
"""What :attr:`OrthogonalFactor.kept` may hold."""
_BASE = "poetx_base"
"""The dtype of a base in half precision."""
_PLACE = ("poetx_key", "poetx_epoch", "poetx_steps")
_SHAPE = ("poetx_count", "poetx_rows", "poetx_columns")


def is_saved(entry: Entry) -> bool:
    """Whether an entry came from a checkpoint and was not read back yet."""
    return entry.get("poetx_live") == 0


def settings_of(entry: Entry) -> dict[str, Any]:
    """With which settings the rotation was trained that an entry belongs to, live or saved; nothing of another entry."""
    return {name: _saved_setting(entry, name) for name in _SETTINGS} if "poetx_live" in entry else {}


def is_current(factor: OrthogonalFactor, entry: Entry) -> bool:
    """Whether a live entry was made with the permutations that the factor has now, or does not depend on them."""
    return entry["poetx_moments"] == factor.epoch or not any(
        torch.is_tensor(value) and value.shape == factor.q.shape for value in entry.values()
    )


def tag(factor: OrthogonalFactor, entry: Entry, moments: int) -> None:
    """Keep beside a live entry what a copy of it needs to go on: the optimizer may be deep-copied or saved in pieces.

    Args:
        moments: the number of the draw of permutations to which the entry belongs.
    """
    if not entry:
        return  # an optimizer takes an empty entry for a first step
    entry.update(_facts(factor), poetx_moments=moments, poetx_live=1)
    entry.update({_PREFIX + name: tensor for name, tensor in factor.kept.items()})
    weight, tensors = factor.weight, [(name, value) for name, value in entry.items() if isinstance(value, Tensor)]
    entry.update({_CODE + name: _code(value) for name, value in tensors if _must_be_bytes(name, value, weight)})


def follow(factor: OrthogonalFactor, entry: Entry, moments: int) -> None:
    """As :func:`tag` at the end of a step, when only its place, and what it keeps, may have changed."""
    if "poetx_live" not in entry:
        tag(factor, entry, moments)
        return
    entry.update(zip(_PLACE, (factor.key, factor.epoch, factor.steps)), poetx_moments=moments)
    entry.update({_PREFIX + name: tensor for name, tensor in factor.kept.items()})


def encode(optimizer: Optimizer, state_dict: Entry) -> Entry:
    """``state_dict`` post-hook: make the entries of converted weights survive ``load_state_dict``."""
    entries = state_dict["state"]
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for parameter, index in zip(group["params"], saved["params"]):
            factor = factors.of_weight(parameter) or factors.of_skew(parameter)
            entry = entries.get(index, {})
            if factor is not None and (entry.get("poetx_live") == 1 or (not entry and factor.steps)):
                factor.follow_weight()
                factor.check_residual()
                entries[index] = _encoded(factor.weight, entry | _facts(factor), factor.kept)
            elif factor is None and entry.get("poetx_live") == 1:  # a deep copy whose model did not run yet
                entries[index] = _encoded(parameter, entry, _kept(entry))
    return state_dict


def start_again(optimizer: Optimizer) -> None:
    """``load_state_dict`` post-hook: where a checkpoint from before the first step was loaded, count from there."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            factor = factors.of_weight(parameter) or factors.of_skew(parameter)
            if factor is not None and factor.steps and not optimizer.state.get(parameter):
                factor.start_again()


def adopt(optimizer: Optimizer) -> bool:
    """Turn loaded entries into live state, for every weight that is converted by now.

    Where one of them cannot continue its rotation, all stay as they are: the next forward or step refuses it.

    Returns:
        Whether entries remain.
    """
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    loaded = [(weight, entry) for weight in held if "poetx_live" in (entry := optimizer.state.get(weight, {}))]
    found = [(factor, entry) for weight, entry in loaded if (factor := factors.of_weight(weight)) is not None]
    if any(_other_setting(factor, entry) or _other_shape(factor, entry) for factor, entry in found):
        return True
    ready = [(factor, entry) for factor, entry in found if factor.is_packed]
    for factor, entry in ready:
        live = _decoded(factor, entry)
        if live:
            optimizer.state[factor.weight] = live
        else:
            del optimizer.state[factor.weight]
    return len(ready) < len(loaded)


def _facts(factor: OrthogonalFactor) -> Entry:
    place_and_shape = (factor.key, factor.epoch, factor.steps, *factor.stack.shape)
    return _numbers(factor.config) | dict(zip((*_PLACE, *_SHAPE), place_and_shape))


@functools.lru_cache(maxsize=64)
def _numbers(config: PoetxConfig) -> Entry:
    return {_PREFIX + name: _as_number(name, getattr(config, name)) for name in _SETTINGS}


def _kept(entry: Entry) -> dict[str, Tensor]:
    return {name: entry[_PREFIX + name] for name in _KEPT if _PREFIX + name in entry}


def _encoded(weight: Tensor, entry: Entry, kept: dict[str, Tensor]) -> Entry:
    entry = {name: value for name, value in entry.items() if not name.startswith(_CODE)}  # of a dtype that the weight had
    saved = {name: value for name, value in entry.items() if not torch.is_tensor(value) or not name.startswith(_PREFIX)}
    for name, value in list(saved.items()):
        if _must_be_bytes(name, value, weight):
            saved[name] = _bytes(value)
            saved[_CODE + name] = _code(value)
    saved.update(poetx_live=0, poetx_dtype=_DTYPES.index(weight.dtype))
    if kept:
        saved.update({_PREFIX + name: _bytes(tensor) for name, tensor in kept.items()})
        if "stored" in kept and kept["stored"].dtype in _DTYPES:
            saved[_BASE] = _DTYPES.index(kept["stored"].dtype)  # the weight may have changed its own since
        saved["poetx_fingerprint"] = int(fingerprint(weight))
    return saved


def _decoded(factor: OrthogonalFactor, entry: Entry) -> Entry:
    key, epoch, steps = (entry[name] for name in _PLACE)
    held = _kept(entry)
    is_fit = held.keys() == factor.kept.keys()
    if not is_saved(entry):  # this factor's own, or those of a deep copy
        mine = (factor.key, factor.epoch, factor.steps) == (key, epoch, steps)
        if not mine or not is_fit or any(held[name] is not tensor for name, tensor in factor.kept.items()):
            factor.resume(key, epoch, steps, held if is_fit else None)
            tag(factor, entry, entry["poetx_moments"])
        return entry
    kept = None
    if held and is_fit and _is_of(factor, entry["poetx_fingerprint"]):
        dtypes = {name: tensor.dtype for name, tensor in factor.kept.items()}
        if _BASE in entry:
            dtypes["stored"] = _DTYPES[entry[_BASE]]
        kept = {
            name: held[name].to(torch.uint8).view(dtypes[name]).view(tensor.shape) for name, tensor in factor.kept.items()
        }
    elif held:
        lost = "the digits below its half-precision rounding start again at zero"
        warnings.warn(
            f"poetx: '{factor.name}' is not the weight that this optimizer state was saved with: "
            f"{lost if factor.base is None else 'it stays as it was rounded to be stored'}. Load the model's state_dict before the "
            "first training step",
            PoetxWarning,
            stacklevel=4,
        )
    factor.resume(key, epoch, steps, kept)
    live = {}
    dtype = _DTYPES[entry["poetx_dtype"]]
    if dtype not in HALF:
        dtype = factor.q.dtype
    for name, value in entry.items():
        if _CODE + name in entry:
            live[name] = _from_bytes(value, entry[_CODE + name])
        elif not name.startswith(_PREFIX):
            cast = torch.is_tensor(value) and value.is_floating_point() and name != "step"
            live[name] = value.to(dtype) if cast else value  # it had the dtype of the weight, which may be another now
    tag(factor, live, entry.get("poetx_moments", epoch))
    return live


def _is_of(factor: OrthogonalFactor, saved: int) -> bool:
    """Whether a weight has the saved values, or had them before it was rounded to be stored."""
    return int(fingerprint(factor.weight)) == saved or (factor.origin is not None and int(factor.origin) == saved)


def ordinary(factor: OrthogonalFactor, entry: Entry) -> Entry:
    """Take over an entry without our tags: one that holds nothing yet.

    Raises:
        PoetxError: the entry was trained without poetx.
    """
    if not any(torch.is_tensor(value) and value.ndim for value in entry.values()):
        return entry
    weight, q = factor.weight, factor.q
    if int(entry.get("step", 1)) == 0:  # allocated by the optimizer's constructor, as Adagrad does
        return {
            name: torch.full_like(q, value.flatten()[0].item())
            if torch.is_tensor(value) and value.shape == weight.shape
            else value
            for name, value in entry.items()
        }
    raise PoetxError(
        f"poetx: the optimizer state of '{factor.name}' comes from ordinary training, or from a checkpoint without poetx's "
        "entries, and cannot continue a rotation. Load only the model's state_dict and start the optimizer anew; or, to go on with "
        "ordinary training, call poetx_compile.restore(model), and compile with backend='inductor'"
    )


def check_settings(factor: OrthogonalFactor, entry: Entry) -> None:
    """Raises:
    PoetxError: the entry belongs to a rotation by other blocks, at another scale, or of a weight of another shape.
    """
    shape = _other_shape(factor, entry)
    if shape is not None:
        raise PoetxError(
            f"poetx: the loaded optimizer state of '{factor.name}' rotates {_readable(shape)}, the weight is "
            f"{_readable(factor.stack.shape)}: it belongs to another model, or to parameters in another order"
        )
    name = _other_setting(factor, entry)
    if name is not None:
        saved, now = _saved_setting(entry, name), getattr(factor.config, name)
        raise PoetxError(
            f"poetx: the checkpoint's '{factor.name}' was trained with {name}={saved}, this run asks for {now}; pass "
            f"options={{'{name}': {saved!r}}} to torch.compile, after poetx_compile.restore(model)"
        )


def _other_setting(factor: OrthogonalFactor, entry: Entry) -> str | None:
    if _numbers(factor.config).items() <= entry.items():
        return None
    return next((name for name in _SETTINGS if not _is_kept(factor, name, _saved_setting(entry, name))), None)


def _is_kept(factor: OrthogonalFactor, name: str, saved: Any) -> bool:
    """Whether a setting is the saved one, or of a ``chunk`` at least means the same blocks."""
    if name == "chunk":
        return factor.stack == StackLayout.of(factor.stack.shape, factor.config.block_size, saved, factor.config.sides)
    return saved == getattr(factor.config, name)


def _saved_setting(entry: Entry, name: str) -> Any:
    """Older checkpoints do not name what had one value only."""
    default = _UNNAMED.get(name, getattr(PoetxConfig, name))
    saved = entry.get(_PREFIX + name, default)
    return _WORDS[name][saved] if isinstance(default, str) and not isinstance(saved, str) else saved


def _as_number(name: str, setting: float | str) -> float:
    return _WORDS[name].index(setting) if isinstance(setting, str) else setting


def _other_shape(factor: OrthogonalFactor, entry: Entry) -> tuple[int, ...] | None:
    saved = tuple(entry.get(name, now) for name, now in zip(_SHAPE, factor.stack.shape))
    return saved if saved != factor.stack.shape else None


def _readable(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape if shape[0] > 1 else shape[1:]))


def _must_be_bytes(name: str, value: Any, weight: Tensor) -> bool:
    if name.startswith(_PREFIX) or name == "step" or not torch.is_tensor(value):
        return False
    return value.dtype in _DTYPES and value.dtype != weight.dtype


def _code(value: Tensor) -> int:
    """Dtype, and whether the tensor is a scalar, as one number."""
    return _DTYPES.index(value.dtype) + (len(_DTYPES) if value.ndim == 0 else 0)


def _bytes(value: Tensor) -> Tensor:
    value = value.detach().contiguous()
    return (value if value.ndim else value[None]).view(torch.uint8)


def _from_bytes(value: Tensor, code: int) -> Tensor:
    tensor = value.to(torch.uint8).view(_DTYPES[code % len(_DTYPES)]).clone()
    return tensor.reshape(()) if code >= len(_DTYPES) else tensor


def _explain(saved: set[str], wanted: set[str]) -> str | None:
    """Why a distributed checkpoint does not fit, by the names of what was saved and of what stands ready to be read into."""
    has, wants = (any(name.endswith(".poetx_live") for name in names) for names in (saved, wanted))
    if has:
        return (
            "poetx: this checkpoint holds the optimizer state of rotations, and the tensors to read it into have other sizes. Call "
            "poetx_compile.prepare(model, batch, options=...), with the options of the run that saved it, before get_state_dict"
        )
    if wants:
        return (
            "poetx: the optimizer state of this checkpoint comes from ordinary training, and a rotation cannot go on from it: "
            "load the model's state only, and start the optimizer anew"
        )
    return None


explain_failed_loads(_explain)
