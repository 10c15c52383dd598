"""DistributedDataParallel and FullyShardedDataParallel, around modules and inside compiled graphs."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn


def distributed_wrapper(weights: Iterable[Tensor]) -> str | None:
    """The kind of wrapper that already manages the gradients of these weights, if any."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule

    wrappers = list(_data_parallel())
    if FSDPModule.__subclasses__():  # ``fully_shard`` has made one, and is no constructor that could tell of its modules
        wrappers += _living(FSDPModule)
    wanted = {id(weight) for weight in weights}
    for wrapper in wrappers:
        if any(id(parameter) in wanted for parameter in wrapper.parameters()):
            return _kind(wrapper)
    return None


def _kind(wrapper: nn.Module) -> str:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    kinds = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    return next(kind.__name__ for kind in kinds if isinstance(wrapper, kind))


@functools.cache
def _data_parallel() -> WeakSet[nn.Module]:
    """Every DistributedDataParallel and FullyShardedDataParallel: those there are, and those built or copied from now on."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    kinds = DistributedDataParallel, FullyShardedDataParallel
    known: WeakSet[nn.Module] = WeakSet(_living(*kinds))
    for kind in kinds:
        for name in ("__init__", "__setstate__"):
            setattr(kind, name, _noting(getattr(kind, name), known))
    return known


def _noting(make: Callable[..., None], known: WeakSet[nn.Module]) -> Callable[..., None]:
    @functools.wraps(make)
    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        known.add(self)

    return noted


def _living(*kinds: type) -> list[nn.Module]:
    """Modules of these kinds among all that Python holds. A scan takes about half a second in a large program."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def within_ddp_constructor(context: Callable[[nn.Module, dict[str, Any]], AbstractContextManager[None]]) -> None:
    """Build every DistributedDataParallel inside ``context(module, arguments)``, by the names of its constructor."""
    if not torch.distributed.is_available():
        return
    from torch.nn.parallel import DistributedDataParallel

    build = DistributedDataParallel.__init__

    @functools.wraps(build)
    def inside(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(build).bind(self, module, *args, **kwargs)
        with context(module, dict(given.arguments)):
            build(self, module, *args, **kwargs)

    DistributedDataParallel.__init__ = inside  # type: ignore[method-assign]


def before_fsdp_constructor(check: Callable[[nn.Module], None]) -> None:
    """Call ``check(module)`` before FullyShardedDataParallel is built around a module. ``fully_shard`` is no class."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    build = FullyShardedDataParallel.__init__

    @functools.wraps(build)
    def checked(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        check(module)
        build(self, module, *args, **kwargs)

    FullyShardedDataParallel.__init__ = checked  # type: ignore[method-assign]


def after_ddp_join(follow: Callable[[nn.Module, Any, int], None]) -> None:
    """When ranks with unequal inputs leave ``join()`` and one sent its weights: ``follow(module, process_group, its_rank)``."""
    if not torch.distributed.is_available():
        return
    from torch.nn.parallel import DistributedDataParallel

    send = DistributedDataParallel._sync_final_model

    @functools.wraps(send)
    def sending(self: Any, is_last_joiner: bool) -> None:
        send(self, is_last_joiner)
        follow(self.module, self.process_group, self._authoritative_rank)

    DistributedDataParallel._sync_final_model = sending  # type: ignore[method-assign]


def count_in_ddp_pieces(reduced_bytes: Callable[[Tensor], int | None]) -> None:
    """Where Dynamo cuts the graph of a DistributedDataParallel model by buckets, let it count what is really reduced.

    Args:
        reduced_bytes: what a parameter takes in a bucket; None for its own bytes.
    """
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import Bucket, DDPOptimizer

    count = DDPOptimizer.add_param_args

    @functools.wraps(count)
    def counting(self: DDPOptimizer, bucket: Bucket, node: fx.Node) -> None:
        count(self, bucket, node)
        for argument in node.args:
            if isinstance(argument, fx.Node) and argument.op == "placeholder" and "grapharg" in argument.meta:
                parameter = argument.meta["grapharg"].example
                reduced = reduced_bytes(parameter)
                if reduced is not None:
                    bucket.size += reduced - parameter.untyped_storage().nbytes()

    DDPOptimizer.add_param_args = counting  # type: ignore[method-assign]


def active_ddp() -> bool:
    """Whether this runs inside the forward of a DistributedDataParallel module."""
    if not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None
