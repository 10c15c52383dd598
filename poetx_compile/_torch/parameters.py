"""``nn.Parameter``: its gradient, its hooks, its subclasses, and the modules that hold it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

_TENSOR_GRAD: Any = torch.Tensor.grad


def own_grad(parameter: Tensor) -> Tensor | None:
    """The gradient that autograd itself keeps on a tensor, whatever ``.grad`` shows."""
    return _TENSOR_GRAD.__get__(parameter)


def set_own_grad(parameter: Tensor, grad: Tensor | None) -> None:
    _TENSOR_GRAD.__set__(parameter, grad)


def replace_grad_attribute(
    read: Callable[[nn.Parameter], Tensor | None], write: Callable[[nn.Parameter, Tensor | None], None]
) -> None:
    """Make ``.grad`` of every ``nn.Parameter`` go through two functions.

    The class stays as it is, so that compiled code, which guards on the type of each parameter, stays valid.
    """
    nn.Parameter.grad = property(read, write, lambda parameter: write(parameter, None))  # type: ignore[assignment]


def hide_from_fakes(is_other: Callable[[Tensor], bool]) -> None:
    """Let fake copies of some tensors have no gradient: those whose ``.grad`` is of another shape or dtype.

    Dynamo breaks its graph at a parameter with a gradient of another dtype; reads of ``.grad`` are traced as any tensor's.
    """
    from torch._dynamo.variables import builder
    from torch._subclasses import meta_utils

    gradient = meta_utils.safe_grad

    @functools.wraps(gradient)
    def hiding(tensor: Any) -> Any:
        return None if is_other(tensor) else gradient(tensor)

    meta_utils.safe_grad = hiding  # type: ignore[assignment]
    builder.safe_grad = hiding  # type: ignore[assignment, attr-defined]


def trace_as_parameter(kind: type[nn.Parameter]) -> None:
    """Let Dynamo take a subclass of ``nn.Parameter`` for a plain one where it traces for a backend that ``takes_stand_ins``.

    Others it hands the ``__torch_function__`` of the class.
    """
    from torch._dynamo.variables import builder

    infer = builder.infer_subclass_type

    @functools.wraps(infer)
    def inferring(value: Any) -> Any:
        return None if type(value) is kind and _is_for_us() else infer(value)

    builder.infer_subclass_type = inferring


def _is_for_us() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    waiting: list[Any] = [InstructionTranslator.current_tx().output.compiler_fn]
    seen: set[int] = set()
    while waiting:
        backend = waiting.pop()
        if getattr(backend, "takes_stand_ins", False):
            return True
        if id(backend) not in seen:
            seen.add(id(backend))
            waiting += [inner for name in _WRAPPED if (inner := getattr(backend, name, None)) is not None]
    return False


_WRAPPED = (
    "_torchdynamo_orig_backend",
    "_torchdynamo_orig_callable",
    "compiler_fn",
    "backend_compile_fn",
    "func",
    "__self__",
)
"""Where the wrappers of backends, torch's and ``functools.partial``, keep what they wrap."""


def notice_changed(parameters: Sequence[nn.Parameter]) -> None:
    """Let Dynamo look again at parameters that were changed in place.

    Up to torch 2.12 its guards take what a module holds for unchanged while its dictionary of parameters is; that changes here,
    and back. Walks the garbage collector's list: not for a hot path.
    """
    if not torch._dynamo.config.use_recursive_dict_tags_for_guards:
        return
    changed = {id(parameter) for parameter in parameters}
    for holder in gc.get_referrers(*parameters):
        if type(holder) is dict:
            for name, value in list(holder.items()):
                if id(value) in changed and isinstance(name, str):
                    holder[name] = None
                    holder[name] = value


def own_operations() -> AbstractContextManager[Any]:
    """Inside, torch does to subclasses of tensors what it does to tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def under_functorch() -> bool:
    """Whether this runs inside ``vmap``, ``grad``, ``jvp`` and their like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def gradient_hooks(parameter: Tensor) -> int:
    """How many hooks wait for a gradient of this tensor."""
    accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return len(parameter._backward_hooks or {}) + len(accumulated)


def modules_with(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Every module alive in this process that holds one of these, itself or further down. Not for a hot path."""
    wanted = {id(parameter) for parameter in parameters}
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module) and "_parameters" in thing.__dict__]
    return [module for module in modules if any(id(parameter) in wanted for parameter in nn.Module.parameters(module))]
