"""What ranks do together: each function runs on every rank of a gloo group, and returns what a test compares."""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import OPTIONS, Block, values
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import poetx_compile
from poetx_compile.backend import poetx
from poetx_compile.registry import factors

GLOBAL_BATCH, STEPS, SAVED_AT = 8, 4, 2
SKEWS_OF_A_LAYER = 8 * 3 * 120
"""Bytes: three blocks of 16 channels, in float64. The layers' weights take 5120 bytes and more."""

NOTED = ("CompiledFunctionBackward", "c10d::allreduce_")
"""What the profiler calls the backward pass of a compiled graph, and a reduction."""

Result = dict[str, Any]


def share(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """This or another rank's part of a global batch."""
    generator = torch.Generator().manual_seed(step)
    batch = (torch.randn(GLOBAL_BATCH, size, generator=generator, dtype=torch.float64) for size in (22, 20))
    rank = distributed.get_rank() if rank is None else rank
    x, target = (tensor.chunk(distributed.get_world_size())[rank] for tensor in batch)
    return x, target


def prepared(**options: Any) -> Block:
    """A model that starts elsewhere on each rank, until the wrapper sends that of rank 0."""
    model = Block()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(distributed.get_rank())
    poetx_compile.prepare(model, share(0)[0], options=OPTIONS | options)
    return model


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="poetx", options=OPTIONS)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, target = share(step)
        F.mse_loss(module(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def compiled_then_wrapped(folder: Path) -> Result:
    model = prepared()
    module, optimizer = DistributedDataParallel(compiled(model)), adamw(model)
    train(module, optimizer, range(SAVED_AT))
    if distributed.get_rank() == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), folder / f"of-{distributed.get_world_size()}.pt")
    train(module, optimizer, range(SAVED_AT, STEPS))
    return {"values": values(model), "reduced": sum(p.numel() for p in module._module_parameters)}


def wrapped_then_compiled(folder: Path) -> Result:
    model = prepared()
    train(compiled(DistributedDataParallel(model)), adamw(model), range(STEPS))
    return {"values": values(model)}


def accumulated(folder: Path) -> Result:
    model = prepared()
    accumulate(DistributedDataParallel(compiled(model)), adamw(model))
    return {"values": values(model)}


def accumulate(module: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    """Two micro-batches a step; only the second is reduced."""
    for step in range(STEPS):
        x, target = share(step)
        with module.no_sync():
            (0.25 * F.mse_loss(module(x), target)).backward()
        (0.75 * F.mse_loss(module(x), target)).backward()
        optimizer.step()
        optimizer.zero_grad()


def in_pieces(folder: Path) -> Result:
    """Dynamo cuts the graph where a bucket is full: at one byte each layer is a piece."""
    pieces: list[int] = []
    early: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        pieces[-1] += 1
        return poetx(gm, inputs, options=OPTIONS)

    for cap in (SKEWS_OF_A_LAYER + 500, 1):
        torch._dynamo.reset()
        pieces.append(0)
        model = prepared()
        module, optimizer = (
            DistributedDataParallel(torch.compile(model, backend=backend), bucket_cap_mb=cap / 2**20),
            adamw(model),
        )
        with mock.patch.object(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", cap):
            train(module, optimizer, range(STEPS - 1))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(module, optimizer, range(STEPS - 1, STEPS))
        early.append(reduced_before_the_last_piece(profiler))
    return {"values": values(model), "pieces": pieces, "early": early}


def reduced_before_the_last_piece(profiler: profile) -> int:
    """How many reductions started before the backward pass of the piece that comes last."""
    began = {name: [event.time_range.start for event in profiler.events() if event.name == name] for name in NOTED}
    backward, reductions = began.values()
    return sum(start < max(backward) for start in reductions)


def dense(folder: Path) -> Result:
    """Gradients of whole weights are made, projected, and handed to the reducer; only each second one is reduced."""
    model = prepared(route="dense")
    searching = error_of(lambda: DistributedDataParallel(model, find_unused_parameters=True))
    module = DistributedDataParallel(torch.compile(model, backend="poetx", options=OPTIONS | {"route": "dense"}))
    accumulate(module, adamw(model))
    return {"values": values(model), "searching": searching}


def static(folder: Path) -> Result:
    """Where the graph is said to stay, a layer that no rank uses is found on the dense route too."""
    return with_an_unused_layer("dense", static_graph=True)


def searched(folder: Path) -> Result:
    return with_an_unused_layer("gram", find_unused_parameters=True)


def with_an_unused_layer(route: str, **settings: bool) -> Result:
    model = prepared(route=route)
    model.unused = nn.Linear(3, 3, dtype=torch.float64)
    module = torch.compile(model, backend="poetx", options=OPTIONS | {"route": route})
    train(DistributedDataParallel(module, gradient_as_bucket_view=True, **settings), adamw(model), range(STEPS))
    del model.unused
    return {"values": values(model)}


def hooked(hook: Callable[..., Any], state: object = None, **options: Any) -> Result:
    model = prepared(**options)
    module = DistributedDataParallel(compiled(model), gradient_as_bucket_view=True)
    module.register_comm_hook(state, hook)
    train(module, adamw(model), range(STEPS))
    return {"values": values(model)}


def compressed_to_float16(folder: Path) -> Result:
    return hooked(fp16_compress_hook)


def compressed_to_bfloat16(folder: Path) -> Result:
    """torch refuses its hook, by name, where there is no NCCL."""

    def hook(state, bucket):  # torch compares annotations with types, and these would be strings
        return bf16_compress_hook(state, bucket)

    return hooked(hook)


def low_rank(folder: Path) -> Result:
    """PowerSGD approximates matrices, and sends vectors, as ``q`` is one, as they are: here nothing is lost."""
    return hooked(powerSGD_hook, PowerSGDState(None, start_powerSGD_iter=2))


def uneven(folder: Path) -> Result:
    """Rank 0 has a batch more than the others, at which permutations are drawn anew; then all go on."""
    model = prepared(permutation_period=STEPS + 1)
    model.to(torch.bfloat16)  # the wrapper must find ``q`` where its weight went
    module = torch.compile(model, backend="poetx", options=OPTIONS | {"permutation_period": STEPS + 1})
    module = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number: int) -> None:
        x, target = (tensor.to(torch.bfloat16) for tensor in share(number))
        F.mse_loss(module(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    before = values(model)
    with module.join():
        for number in range(STEPS + (distributed.get_rank() == 0)):
            step(number)
    poetx_compile.check_ranks(model)
    joined = values(model)
    step(STEPS + 1)
    step(STEPS + 2)
    poetx_compile.check_ranks(model)
    counts = [(factor.epoch, factor.steps) for factor in factors.of_module(model)]
    moved = [bool((a != b).any()) for a, b in zip(before, joined)]
    return {"values": values(model), "joined": joined, "counts": counts, "moved": moved}


def uneven_alone(folder: Path) -> Result:
    """What rank 0 reaches, whose last batch counts as its share of a global one, beside the same without a wrapper."""
    world = distributed.get_world_size()
    model = prepared()
    module, optimizer = DistributedDataParallel(compiled(model)), torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Block()
    reference.load_state_dict(model.state_dict())
    with module.join():
        train(module, optimizer, range(STEPS + (distributed.get_rank() == 0)))
    plain = compiled(reference)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS + 1):
        for rank in range(world if step < STEPS else 1):
            x, target = share(step, rank)
            (F.mse_loss(plain(x), target) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"values": values(model), "expected": values(reference)}


def rounded_stochastically(folder: Path) -> Result:
    """Half-precision weights without a residual."""
    options = OPTIONS | {"residual_bits": 0}
    model = Block().to(torch.bfloat16)
    poetx_compile.prepare(model, share(0)[0].bfloat16(), options=options)
    train_in_half(model, options)
    return {"values": values(model)}


def train_in_half(model: Block, options: dict[str, Any]) -> None:
    module, optimizer = DistributedDataParallel(torch.compile(model, backend="poetx", options=options)), adamw(model)
    for step in range(STEPS):
        x, target = (tensor.bfloat16() for tensor in share(step))
        F.mse_loss(module(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def stored_in_int8(folder: Path) -> Result:
    """Half-precision weights as codes and rotations, with new permutations between; one rank is damaged and repaired."""
    options = OPTIONS | {"storage": "int8", "permutation_period": 3}
    model = Block().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(distributed.get_rank())
    poetx_compile.prepare(model, share(0)[0].bfloat16(), options=options)
    train_in_half(model, options)
    agreed = error_of(lambda: poetx_compile.check_ranks(model))
    if distributed.get_rank() == distributed.get_world_size() - 1:
        factors.of_module(model)[1].base.rows[0, 0, 0] += 1e-5
    message = error_of(lambda: poetx_compile.check_ranks(model))
    poetx_compile.check_ranks(model, repair=True)
    kept = [tensor for factor in factors.of_module(model) for tensor in factor.kept.values()]
    return {"agreed": agreed, "message": message, "values": [*values(model), *kept]}


def resumed_from_two(folder: Path) -> Result:
    model = prepared()
    weights, states = torch.load(folder / "of-2.pt", weights_only=True)
    optimizer = adamw(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(states)
    train(DistributedDataParallel(compiled(model)), optimizer, range(SAVED_AT, STEPS))
    return {"values": values(model)}


def checked(folder: Path) -> Result:
    """One rank's weight is damaged, found, and repaired."""
    model = prepared()
    module = DistributedDataParallel(compiled(model))
    poetx_compile.check_ranks(module)
    damage(model)
    message = error_of(lambda: poetx_compile.check_ranks(model))
    repaired = warnings_of(lambda: poetx_compile.check_ranks(model, repair=True))
    poetx_compile.check_ranks(model)
    return {"message": message, "repaired": repaired, "values": values(model)}


def damage(model: Block) -> None:
    if distributed.get_rank() == distributed.get_world_size() - 1:
        with torch.no_grad():
            model.layers[2].weight[3].mul_(1 + 1e-9)


def watched(folder: Path) -> Result:
    """A damage is told by each second step, repaired by one that repairs, and not seen by a watch that was removed."""
    model = prepared()
    module, optimizer = DistributedDataParallel(compiled(model)), adamw(model)
    refused = error_of(lambda: poetx_compile.watch_ranks(model, optimizer, every=0))
    wrapper = error_of(lambda: poetx_compile.watch_ranks(model, Accelerator(cpu=True).prepare(optimizer)))
    steps = iter(range(1_000))

    def step() -> None:
        number = next(steps)
        train(module, optimizer, range(number, number + 1))

    handle = poetx_compile.watch_ranks(model, optimizer, every=2)
    agreed = [error_of(step) for _ in range(3)]
    damage(model)
    told = error_of(step)
    unseen = error_of(step)
    handle.remove()
    removed = error_of(step)
    poetx_compile.watch_ranks(model, optimizer, every=1, repair=True)
    repaired = [warnings_of(step) for _ in range(2)]
    messages = {"agreed": agreed, "told": told, "unseen": unseen, "removed": removed, "repaired": repaired}
    return {"values": values(model), "refused": refused, "wrapper": wrapper, **messages}


def accelerated(folder: Path) -> Result:
    """``accelerate.prepare`` builds the wrapper around the compiled module."""
    accelerator = Accelerator(cpu=True)
    model = prepared()
    module, optimizer = accelerator.prepare(compiled(model), adamw(model))
    return trained_by(accelerator, model, module, optimizer)


def accelerated_then_compiled(folder: Path) -> Result:
    accelerator = Accelerator(cpu=True)
    model = prepared()
    module, optimizer = accelerator.prepare(model, adamw(model))
    return trained_by(accelerator, model, compiled(module), optimizer)


def trained_by(accelerator: Accelerator, model: Block, module: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    for step in range(STEPS):
        x, target = share(step)
        accelerator.backward(F.mse_loss(module(x), target))
        optimizer.step()
        optimizer.zero_grad()
    poetx_compile.check_ranks(model)
    return {"values": values(model), "kind": str(accelerator.distributed_type)}


def wrapped_unprepared(folder: Path) -> Result:
    model = Block()
    modules = DistributedDataParallel(compiled(model)), compiled(DistributedDataParallel(model))
    messages = [error_of(partial(module, share(0)[0])) for module in modules]
    return {"messages": messages, "converted": any(factors.of_weight(weight) for weight in model.parameters())}


def prepared_differently(folder: Path) -> Result:
    model = prepared(seed=distributed.get_rank())
    return {
        "message": error_of(lambda: DistributedDataParallel(model)),
        "names": [name for name, _ in model.named_parameters()],
    }


def sharded(folder: Path) -> Result:
    """Each refusal leaves every weight as it was."""
    model = prepared()
    module = DistributedDataParallel(compiled(model))
    before = values(model)
    x, target = share(0)
    F.mse_loss(module(x), target).backward()
    shared = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    messages = {
        "states": error_of(shared.step),
        "one by one": error_of(lambda: FullyShardedDataParallel(model, device_id=torch.device("cpu"))),
    }
    unchanged = all(torch.equal(ours, then) for ours, then in zip(values(model), before, strict=True))
    adamw(model).step()
    moved = [not torch.equal(ours, then) for ours, then in zip(values(model), before, strict=True)]
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name, shard in (("converted", prepared()), ("ordinary", Block())):
        fully_shard(shard, mesh=mesh)
        messages[name] = error_of(partial(compiled(shard), x))
    return {"messages": messages, "unchanged": unchanged, "moved": moved}


SCENARIOS = (
    sharded,
    compiled_then_wrapped,
    wrapped_then_compiled,
    accumulated,
    in_pieces,
    dense,
    static,
    searched,
    compressed_to_float16,
    compressed_to_bfloat16,
    low_rank,
    uneven,
    uneven_alone,
    rounded_stochastically,
    stored_in_int8,
    resumed_from_two,
    checked,
    watched,
    accelerated,
    accelerated_then_compiled,
    wrapped_unprepared,
    prepared_differently,
)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def warnings_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", poetx_compile.PoetxWarning)
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, poetx_compile.PoetxWarning)]


def run_all(folder: Path, world: int) -> list[dict[str, Result]]:
    """What each rank of a group of ``world`` returns, by scenario."""
    torch.multiprocessing.start_processes(_rank, (world, folder), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )  # accelerate's
    store = distributed.FileStore(str(folder / f"store-{world}"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {}
    for scenario in SCENARIOS:
        torch._dynamo.reset()
        results[scenario.__name__] = scenario(folder)
    buffer = io.BytesIO()
    torch.save(results, buffer)
    (folder / f"{world}-{rank}.pt").write_bytes(buffer.getvalue())
    distributed.barrier()
    gc.collect()  # a wrapper that outlives the group may wait for ever for the thread that runs its hook
    distributed.destroy_process_group()
