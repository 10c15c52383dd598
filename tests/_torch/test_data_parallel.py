"""What wrappers for many ranks are asked and told."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from captured import Net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from poetx_compile._torch import data_parallel
from poetx_compile._torch.data_parallel import (
    active_ddp,
    after_ddp_join,
    before_fsdp_constructor,
    count_in_ddp_pieces,
    distributed_wrapper,
    within_ddp_constructor,
)


def test_without_a_process_group_nothing_is_wrapped() -> None:
    assert distributed_wrapper(Net().parameters()) is None
    assert not active_ddp()


@pytest.mark.usefixtures("process_group")
def test_a_data_parallel_model_is_recognised_by_its_weights() -> None:
    net, other = Net(), Net()
    wrapped = DistributedDataParallel(net)
    assert distributed_wrapper([net.fc.weight]) == "DistributedDataParallel"
    assert distributed_wrapper([other.fc.weight]) is None
    del wrapped


@pytest.mark.usefixtures("process_group")
def test_all_objects_are_looked_at_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan for each weight took minutes with a model whose layers are compiled one by one."""
    distributed_wrapper(Net().parameters())
    living, asked = data_parallel._living, []
    monkeypatch.setattr(data_parallel, "_living", lambda *kinds: asked.extend(kinds) or living(*kinds))
    net, other = Net(), Net()
    wrapped = DistributedDataParallel(net)
    assert distributed_wrapper([other.fc.weight]) is None
    assert distributed_wrapper([net.fc.weight]) == "DistributedDataParallel"
    copied = copy.deepcopy(wrapped)
    assert distributed_wrapper([copied.module.fc.weight]) == "DistributedDataParallel"
    assert DistributedDataParallel not in asked
    del wrapped
    gc.collect()
    assert distributed_wrapper([net.fc.weight]) is None


@pytest.mark.usefixtures("process_group")
def test_a_fully_sharded_model_is_recognised_by_its_weights() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
    assert distributed_wrapper(net.parameters()) == "FSDPModule"


@pytest.mark.usefixtures("process_group")
def test_what_stands_in_a_slot_while_ddp_is_built_is_what_it_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other, given = Net(), nn.Parameter(torch.zeros(5)), []
    weight = net.fc.weight

    @contextmanager
    def swapped(module: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
        given.append(arguments)
        module.fc._parameters["weight"] = other
        yield
        module.fc._parameters["weight"] = weight

    monkeypatch.setattr(DistributedDataParallel, "__init__", DistributedDataParallel.__init__)
    within_ddp_constructor(swapped)
    wrapped = DistributedDataParallel(net, None, process_group=dist.group.WORLD)
    assert given[0]["process_group"] is dist.group.WORLD
    assert given[0]["device_ids"] is None
    reduced = {id(parameter) for parameter in wrapped._module_parameters}
    assert id(other) in reduced
    assert id(weight) not in reduced
    assert net.fc.weight is weight


@pytest.mark.usefixtures("process_group")
def test_pieces_count_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.distributed import DDPOptimizer

    monkeypatch.setattr(DDPOptimizer, "add_param_args", DDPOptimizer.add_param_args)
    net = Net()
    count_in_ddp_pieces(lambda parameter: 1000 if parameter is net.fc.weight else None)
    sizes: list[int] = []
    cut = DDPOptimizer.compile_fn

    def looking(self: DDPOptimizer, *args: Any, **kwargs: Any) -> Any:
        compiled = cut(self, *args, **kwargs)
        sizes.extend(bucket.size for bucket in self.buckets)
        return compiled

    monkeypatch.setattr(DDPOptimizer, "compile_fn", looking)
    torch.compile(DistributedDataParallel(net), backend="eager")(torch.ones(2, 3))
    assert sizes == [1000 + 4 * 4]


@pytest.mark.usefixtures("process_group")
def test_a_module_is_seen_before_fsdp_shards_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def check(module: nn.Module) -> None:
        raise ValueError(type(module).__name__)

    monkeypatch.setattr(FullyShardedDataParallel, "__init__", FullyShardedDataParallel.__init__)
    before_fsdp_constructor(check)
    with pytest.raises(ValueError, match="Net"):
        FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))


@pytest.mark.usefixtures("process_group")
def test_leaving_a_join_is_noted_with_the_rank_whose_weights_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, Any, int]] = []
    monkeypatch.setattr(DistributedDataParallel, "_sync_final_model", DistributedDataParallel._sync_final_model)
    after_ddp_join(lambda *args: seen.append(args))
    net = Net()
    wrapped = DistributedDataParallel(net, process_group=dist.group.WORLD)
    with wrapped.join():
        wrapped(torch.ones(2, 3)).sum().backward()
    assert seen == [(net, dist.group.WORLD, 0)]


@pytest.mark.usefixtures("process_group")
def test_active_ddp_holds_inside_its_forward() -> None:
    seen: list[bool] = []
    net = Net()
    net.register_forward_hook(lambda *args: seen.append(active_ddp()))
    wrapped = DistributedDataParallel(net)
    wrapped(torch.ones(2, 3))
    net(torch.ones(2, 3))
    assert seen == [True, False]
