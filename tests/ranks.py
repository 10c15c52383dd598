"""What ranks do together: each function runs on every rank of a gloo group, and returns what a test compares."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from helpers import OPTIONS, Block, values
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import poetx_compile
from poetx_compile.factor import factors

GLOBAL_BATCH, STEPS, SAVED_AT = 8, 4, 2

Result = dict[str, Any]


def share(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a global batch."""
    generator = torch.Generator().manual_seed(step)
    batch = (torch.randn(GLOBAL_BATCH, size, generator=generator, dtype=torch.float64) for size in (22, 20))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x, target = (tensor.chunk(world)[rank] for tensor in batch)
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
    """Two micro-batches a step; only the second is reduced."""
    model = prepared()
    module, optimizer = DistributedDataParallel(compiled(model)), adamw(model)
    for step in range(STEPS):
        x, target = share(step)
        with module.no_sync():
            (0.5 * F.mse_loss(module(x), target)).backward()
        (0.5 * F.mse_loss(module(x), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"values": values(model)}


def compressed(folder: Path) -> Result:
    model = prepared()
    module = DistributedDataParallel(compiled(model), gradient_as_bucket_view=True)
    module.register_comm_hook(None, fp16_compress_hook)
    train(module, adamw(model), range(STEPS))
    return {"values": values(model)}


def uneven(folder: Path) -> Result:
    """Rank 0 has one batch more than the others."""
    model = prepared()
    module, optimizer = DistributedDataParallel(compiled(model)), adamw(model)
    with module.join():
        train(module, optimizer, range(STEPS + (distributed.get_rank() == 0)))
    distributed.barrier()
    return {}


def rounded_stochastically(folder: Path) -> Result:
    """Half-precision weights without a residual."""
    options = OPTIONS | {"residual_bits": 0}
    model = Block().to(torch.bfloat16)
    poetx_compile.prepare(model, share(0)[0].bfloat16(), options=options)
    module, optimizer = DistributedDataParallel(torch.compile(model, backend="poetx", options=options)), adamw(model)
    for step in range(STEPS):
        x, target = (tensor.bfloat16() for tensor in share(step))
        F.mse_loss(module(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"values": values(model)}


def resumed_from_one(folder: Path) -> Result:
    model = prepared()
    weights, states = torch.load(folder / "of-1.pt", weights_only=True)
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
    if distributed.get_rank() == distributed.get_world_size() - 1:
        with torch.no_grad():
            model.layers[2].weight[3].mul_(1 + 1e-9)
    message = error_of(lambda: poetx_compile.check_ranks(model))
    poetx_compile.check_ranks(model, repair=True)
    poetx_compile.check_ranks(model)
    return {"message": message, "values": values(model)}


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


SCENARIOS = (
    compiled_then_wrapped,
    wrapped_then_compiled,
    accumulated,
    compressed,
    uneven,
    rounded_stochastically,
    resumed_from_one,
    checked,
    wrapped_unprepared,
    prepared_differently,
)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def run_all(folder: Path, world: int) -> list[dict[str, Result]]:
    """What each rank of a group of ``world`` returns, by scenario."""
    torch.multiprocessing.start_processes(_rank, (world, folder), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
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
    distributed.destroy_process_group()
