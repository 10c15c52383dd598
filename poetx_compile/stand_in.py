"""The parameter that a user holds while its weight is stored lean: same object, same shape, and no memory of its own.

Whatever reads its values gets the effective weight, made there and then, as a differentiable function of ``q``; what writes to
it writes the weight. Compiled graphs do not ask it: they take what it is made of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ._torch.parameters import own_operations, trace_as_parameter, under_functorch
from ._torch.tensors import map_tensors, storage_of, tensors_in
from .base import BASES, check_range
from .errors import PoetxError
from .factor import OrthogonalFactor
from .fingerprint import fingerprint
from .kernels import LINEAR_VERSION, lean_linear, lean_weight
from .registry import factors

Function = Callable[..., Any]

_FACTS = """
    size stride dim ndimension numel nelement element_size is_contiguous storage_offset is_floating_point is_complex is_signed
    is_same_size is_set_to get_device is_inference is_conj is_neg has_names is_pinned is_shared __len__ requires_grad_ register_hook
    register_post_accumulate_grad_hook retain_grad _is_view _has_compatible_shallow_copy_type empty_like zeros_like ones_like
    full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full new_empty_strided result_type data_ptr storage
    untyped_storage _typed_storage
"""
_METADATA = set(_FACTS.split())
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Attributes that are values of the tensor; the others are facts about it."""

_MOVES = {"to", "cpu", "cuda", "half", "float", "double", "bfloat16"}
_moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Effective weights that were made on the way to another device or dtype, each with its parameter and the versions of both."""


class StandIn(nn.Parameter):
    """A parameter whose class was changed while its weight is stored lean; see :func:`pack`."""

    def __new__(cls, *data: Any, **settings: Any) -> Any:
        """What ``type(parameter)(...)`` makes of new values is an ordinary parameter."""
        return nn.Parameter(*data, **settings)

    @classmethod
    @torch._dynamo.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, kind = _name(func)
        if kind == "__get__" and name not in _VALUES:
            return _raw(func, *args, **kwargs)
        if kind == "__set__" and name != "data":
            return _raw(func, *args, **kwargs)
        if kind == "" and name in _METADATA:
            return _raw(func, *args, **kwargs)
        if name == "data":
            return _read_data(args[0]) if kind == "__get__" else _write_data(*args)
        if getattr(func, "__module__", None) == torch.nn.init.__name__:  # some hand themselves over before their own no_grad
            with torch.no_grad():
                return _call(func, name, args, kwargs)
        product = _PRODUCTS.get(func)
        if product is not None and kwargs.keys() <= {"weight", "bias"}:
            result = product(*args, **kwargs)
            if result is not None:
                return result
        return _call(func, name, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(values(self), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(values(self), self.requires_grad).__reduce_ex__(protocol)


class _Data(Tensor):
    """What ``.data`` of a stand-in gives, and views of it: values, which take writes back to the weight."""

    _of: nn.Parameter
    _whole: Tensor

    @classmethod
    def of(cls, values: Tensor, weight: nn.Parameter, whole: Tensor) -> _Data:
        """``values``, which share the memory of ``whole``, the effective weight."""
        data = values.as_subclass(cls)
        data._of, data._whole = weight, whole
        return data

    @classmethod
    @torch._dynamo.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = map_tensors(_dense, (args, kwargs or {}))
        given = [(tensor, _raw_version(tensor)) for tensor in tensors_in((args, kwargs)) if isinstance(tensor, _Data)]
        result = _raw(func, *args, **kwargs)
        for data, version in given:
            if _raw_version(data) != version:
                write(data._of, data._whole)
        return result if _name(func)[0] == "detach" else _views(result, [(data._of, data._whole) for data, _ in given])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _raw(Tensor.clone, self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _raw(Tensor.as_subclass, self, Tensor).__reduce_ex__(protocol)


def _views(result: Any, wholes: list[tuple[nn.Parameter, Tensor]]) -> Any:
    """A result with those of its tensors that share an effective weight's memory as :class:`_Data`."""

    def wrapped(tensor: Tensor) -> Tensor:
        for weight, whole in wholes:
            if type(tensor) is Tensor and not tensor.requires_grad and storage_of(tensor) == storage_of(whole):
                return tensor if tensor is whole else _Data.of(tensor, weight, whole)
        return tensor

    return map_tensors(wrapped, result)


def pack(converted: Iterable[OrthogonalFactor]) -> None:
    """Store weights as the ``storage`` of their factors says, where that is not done; parameters become :class:`StandIn`.

    Raises:
        PoetxError: a weight cannot be stored so; all stay as they were.
    """
    waiting = [factor for factor in converted if not factor.is_packed]
    for factor in waiting:
        check_range(factor.weight.data, factor.name, factor.storage)
    for factor in waiting:
        _pack(factor)


def _pack(factor: OrthogonalFactor) -> None:
    weight = factor.weight
    before = weight.data
    base = BASES[factor.storage](before, factor.stack)
    base.write(before)
    factor.origin = fingerprint(before)
    factor.base = base
    _hide(weight)
    weight.__class__ = StandIn


def unpack(factor: OrthogonalFactor) -> None:
    """Make the parameter hold its weight itself, and be an ordinary one."""
    if factor.base is None:
        return
    weight, dense = factor.weight, values(factor.weight)
    weight.__class__ = nn.Parameter
    weight.data = dense
    factor.base = None


def is_stand_in(value: object) -> bool:
    return isinstance(value, StandIn)


def _dense(tensor: Any) -> Tensor:
    return values(tensor) if is_stand_in(tensor) else tensor


def values(weight: nn.Parameter) -> Tensor:
    """The effective weight, dense and new: no part of a graph of autograd, and no inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        return _factor(weight).made().weight()


@torch.no_grad()
def write(weight: nn.Parameter, dense: Tensor) -> None:
    """Make a lean weight what ``dense`` ``[m, n]`` says.

    Raises:
        PoetxError: it holds numbers that cannot be stored; the weight stays as it was.
    """
    factor = _factor(weight)
    assert factor.base is not None
    check_range(dense, factor.name, factor.storage)
    factor.base.write(dense)
    factor.origin = fingerprint(dense)
    torch.autograd.graph.increment_version(weight)


def _factor(weight: nn.Parameter) -> OrthogonalFactor:
    factor = factors.of_weight(weight)
    assert factor is not None, "a stand-in has a factor until it is unpacked"
    return factor


def _hide(weight: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    """Let a parameter point to a single NaN: what reads it by another way than ours sees that something is wrong."""
    with own_operations():
        nothing = torch.full((), torch.nan, dtype=dtype or weight.dtype, device=device or weight.device)
        weight.data = nothing.expand(weight.shape)


def _differentiable(weight: nn.Parameter) -> Tensor:
    """The effective weight as a function of ``q``, where gradients are on and wanted."""
    factor = _factor(weight)
    if not (torch.is_grad_enabled() and weight.requires_grad) or under_functorch():
        return values(weight)
    *operands, dtype, _, precision = factor.made()
    sides = factor.rows, factor.columns
    blocks = (*(side.width for side in sides), factor.config.scale, LINEAR_VERSION, *(side.run for side in sides))
    return lean_weight(*operands, factor.q, dtype, precision, *blocks)


def _linear(x: Any, weight: Any, bias: Any = None, transposed: bool = False) -> Tensor | None:
    """The product that keeps no weight for the backward pass; None where it does not serve."""
    if not is_stand_in(weight) or is_stand_in(x) or is_stand_in(bias) or under_functorch() or weight.ndim != 2:
        return None
    if not (torch.is_grad_enabled() and weight.requires_grad) or (transposed and bias is not None and x.ndim != 2):
        return None
    factor = _factor(weight)
    stored, scales, rows, row_channels, columns, column_channels, dtype, _, precision = factor.made()
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    operands = (x, stored, scales, rows, row_channels, columns, column_channels, bias, factor.q, dtype, precision)
    widths = factor.rows.width, factor.columns.width
    runs = factor.rows.run, factor.columns.run
    saved = lean_linear(*operands, *widths, factor.config.scale, transposed, LINEAR_VERSION, *runs)
    return saved.clone()  # which may be overwritten


def _matmul(x: Any, weight: Any) -> Tensor | None:
    return _linear(x, weight, transposed=True)


_PRODUCTS: dict[Any, Function] = {
    torch.nn.functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul),
    torch.addmm: lambda bias, x, weight: _linear(x, weight, bias, transposed=True) if bias.ndim == 1 else None,
}


def _call(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on effective weights, and take up what it wrote to them."""
    made: dict[int, tuple[nn.Parameter, Tensor, int]] = {}

    def dense(tensor: Tensor) -> Tensor:
        if not is_stand_in(tensor):
            return tensor
        if id(tensor) not in made:
            weight: Any = tensor
            effective = values(weight) if name == "detach" else _differentiable(weight)
            made[id(tensor)] = weight, effective, effective._version
        return made[id(tensor)][1]

    args, kwargs = map_tensors(dense, (args, kwargs))
    result = func(*args, **kwargs)
    written = {id(effective): weight for weight, effective, version in made.values() if effective._version != version}
    for weight, effective, _ in made.values():
        if id(effective) in written:
            if torch.is_grad_enabled() and weight.requires_grad:
                raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
            write(weight, effective)
    if name in _MOVES and isinstance(result, Tensor):
        moved = next(iter(made.values()))[0]
        _moved[result] = weakref.ref(moved), _raw_version(moved), result._version
    if written:
        return map_tensors(lambda tensor: written.get(id(tensor), tensor), result)
    is_copy = name == "detach" or name in _MOVES or under_functorch()
    return result if is_copy else _views(result, [(weight, effective) for weight, effective, _ in made.values()])


def _read_data(weight: nn.Parameter) -> Tensor:
    whole = values(weight)
    return _Data.of(whole.view_as(whole), weight, whole)


def _write_data(weight: nn.Parameter, dense: Tensor) -> None:
    """``weight.data = dense``: new values, or, as ``model.to(...)`` does it, the same ones elsewhere or in another dtype."""
    moved, then, version = _moved.get(dense, (None, 0, 0))
    if dense.shape != weight.shape:
        raise PoetxError(
            f"poetx: '{_factor(weight).name}' is stored lean and cannot take another shape; call poetx_compile.restore(model) first"
        )
    is_moved = moved is not None and moved() is weight and (_raw_version(weight), dense._version) == (then, version)
    if not is_moved:
        dense = _raw(Tensor.as_subclass, _dense(dense), Tensor)
        check_range(dense, _factor(weight).name, _factor(weight).storage)
    _hide(weight, dense.device, dense.dtype)
    _factor(weight).follow_weight()
    if not is_moved:
        write(weight, dense)


def _name(func: Any) -> tuple[str, str]:
    """Of an operation, or of an attribute and how it is accessed."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func.__self__, "__name__", ""), name
    return name, ""


def _raw(func: Function, *args: Any, **kwargs: Any) -> Any:
    with own_operations():
        return func(*args, **kwargs)


def _raw_version(tensor: Tensor) -> int:
    with own_operations():
        return tensor._version


trace_as_parameter(StandIn)
