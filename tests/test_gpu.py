"""Training on a CUDA device, through Inductor and the Triton kernels."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Experts, factor_of
from torch import Tensor, nn

from poetx_compile import PoetxConfig, conversion, doctor, stand_in
from poetx_compile.backend import poetx
from poetx_compile.base import BASES
from poetx_compile.kernels import HALF, block_gram, cayley_neumann, decode, naive, rotate_
from poetx_compile.layout import BlockLayout

pytestmark = pytest.mark.gpu

WIDTHS = {"full": (768, 256), "ragged": (1000, 128), "narrow": (384, 256), "tiny": (48, 32), "wide": (1024, 512)}


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(96, 320), nn.GELU(), nn.Linear(320, 200, bias=False), nn.LayerNorm(200))
    return layers.to("cuda", dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    x, target = (torch.randn(64, size, generator=generator, device="cuda") for size in (96, 200))
    return x.to(dtype), target.to(dtype)


def train(model: Any, optimizer: torch.optim.Optimizer, dtype: torch.dtype, steps: range) -> None:
    for step in steps:
        x, target = batch(step, dtype)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_doctor() -> None:
    assert doctor.run()


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_kernels_agree_with_their_oracle(shape: str, dtype: torch.dtype) -> None:
    features, block = WIDTHS[shape]
    rows, columns = BlockLayout.of(features, block, 16), BlockLayout.of(304, block, 16)
    channels = [layout.channels(1, side, 0).cuda() for side, layout in enumerate((rows, columns))]
    left, right = (torch.randn(333, features, device="cuda", dtype=dtype) for _ in range(2))
    side = [left], [right], [channels[0]], [rows.width], [rows.run]
    gram = block_gram(*side)
    expected = naive.block_gram(left.double(), right.double(), channels[0], rows.width)
    assert torch.linalg.norm(gram - expected) < 1e-6 * torch.linalg.norm(expected)
    assert torch.equal(gram, block_gram(*side))

    skews = [torch.randn(layout.skew, device="cuda") * 3e-3 for layout in (rows, columns)]
    turns = [cayley_neumann(skew, layout.width, 1.0) for skew, layout in zip(skews, (rows, columns))]
    exact = [naive.cayley_neumann(skew.double(), layout.width, 1.0) for skew, layout in zip(skews, (rows, columns))]
    for turn, one in zip(turns, exact):
        assert torch.linalg.norm(turn - one) < 1e-6 * torch.linalg.norm(one)

    weight = torch.randn(features, 304, device="cuda").to(dtype)
    residual = torch.randint(-100, 100, weight.shape, device="cuda", dtype=torch.int8) if dtype in HALF else None
    master = decode(weight, residual).double()
    naive.rotate_(master, None, exact[0], channels[0], exact[1], channels[1])
    rotate_(weight, residual, turns[0], channels[0], turns[1], channels[1], columns.run)
    assert torch.linalg.norm(decode(weight, residual) - master) < 1.5e-5 * torch.linalg.norm(master)


def test_a_step_equals_the_cpus() -> None:
    models = {"cuda": network(torch.float32)}
    models["cpu"] = copy.deepcopy(models["cuda"]).cpu()
    for device, model in models.items():
        inner = "inductor" if device == "cuda" else "aot_eager"
        compiled = torch.compile(model, backend="poetx", options={"block_size": 64, "inner": inner, "updates": "given"})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for step in range(3):
            x, target = (tensor.to(device) for tensor in batch(step, torch.float32))
            F.mse_loss(compiled(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(models["cuda"].parameters(), models["cpu"].parameters()):
        assert torch.allclose(ours.cpu(), theirs, atol=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)))
def test_singular_values_stay_through_a_thousand_steps(dtype: torch.dtype, tolerance: float) -> None:
    model = network(dtype)
    weights = [model[0].weight, model[2].weight]
    before = [torch.linalg.svdvals(weight.double()) for weight in weights]
    compiled = torch.compile(model, backend="poetx", options={"block_size": 64})
    train(compiled, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True, eps=1e-6), dtype, range(1000))
    for weight, start in zip(weights, before):
        factor = factor_of(weight)
        after = torch.linalg.svdvals(decode(weight.detach(), factor.residual).double())
        assert (after - start).abs().max() < tolerance * start.max()


@pytest.mark.parametrize("storage", BASES)
def test_lean_rotations_stay_orthogonal_through_a_thousand_steps(storage: str) -> None:
    model = network(torch.bfloat16)
    compiled = torch.compile(model, backend="poetx", options={"block_size": 64, "storage": storage})
    train(compiled, torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True, eps=1e-6), torch.bfloat16, range(1000))
    for weight in (model[0].weight, model[2].weight):
        base = factor_of(weight).base
        assert base is not None
        for turn in (base.rows, base.columns):
            assert turn is not None
            defect = turn.double() + turn.mT.double() + turn.mT.double() @ turn.double()
            assert turn.abs().max() > 0.05
            assert defect.abs().max() < 5e-5


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [*((dtype, "folded") for dtype in (torch.float32, *HALF)), *((dtype, storage) for dtype in HALF for storage in BASES)],
    ids=str,
)
def test_resume_is_exact(dtype: torch.dtype, storage: str) -> None:
    options = {"block_size": 64, "permutation_period": 3, "storage": storage}

    def fresh() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = network(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        return model, torch.compile(model, backend="poetx", options=options), optimizer

    model, compiled, optimizer = fresh()
    train(compiled, optimizer, dtype, range(4))
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    train(compiled, optimizer, dtype, range(4, 8))

    again, compiled_again, optimizer_again = fresh()
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    again.load_state_dict(weights)
    optimizer_again.load_state_dict(state)
    train(compiled_again, optimizer_again, dtype, range(4, 8))
    for one, other in zip(model.parameters(), again.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("storage", BASES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_lean_weights_train_as_folded_ones(dtype: torch.dtype, storage: str, mode: str) -> None:
    """By SGD: AdamW keeps second moments of ordinary float16 parameters in float16, where these vanish."""
    start = [parameter.detach() for parameter in network(dtype).parameters()]
    trained = []
    for its in ("folded", storage):
        torch._dynamo.reset()
        model = network(dtype)
        compiled = torch.compile(model, backend=partial(poetx, mode=mode, options={"storage": its}))
        train(compiled, torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9), dtype, range(8))
        trained.append([parameter.detach() for parameter in model.parameters()])
    assert factor_of(model[0].weight).storage == storage
    for ours, theirs, before in zip(*trained, start):
        apart, moved = (ours.float() - theirs.float()).norm(), (theirs.float() - before.float()).norm()
        assert apart <= (0.06 if storage == "int8" else 0.03) * moved


@pytest.mark.parametrize("storage", BASES)
def test_a_lean_weight_takes_the_memory_that_is_said(storage: str) -> None:
    torch.cuda.synchronize()
    model = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    factor = conversion.adopt(model.weight, "weight", PoetxConfig(), storage=storage)
    without = factor.q.nbytes + factor.row_channels.nbytes + factor.column_channels.nbytes
    stand_in.pack([factor])
    assert factor.base is not None
    grown = torch.cuda.memory_allocated() - before
    assert abs(grown - (factor.base.nbytes + without - 2 * 4096**2)) < 1 << 20
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    model.weight.detach()
    assert torch.cuda.max_memory_allocated() - held < 3.5 * 4096**2 + factor.base.nbytes - factor.base.number_bytes


def test_a_lean_model_moves_to_the_gpu_and_back() -> None:
    model = network(torch.bfloat16)
    compiled = torch.compile(model, backend="poetx", options={"block_size": 64, "storage": "int8"})
    train(compiled, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.bfloat16, range(3))
    factor = factor_of(model[0].weight)
    before = {name: tensor.cpu() for name, tensor in factor.kept.items()}
    model.cpu()
    assert all(tensor.device.type == "cpu" and torch.equal(tensor, before[name]) for name, tensor in factor.kept.items())
    on_cpu = model[0].weight.detach()
    model.cuda()
    assert all(tensor.is_cuda and torch.equal(tensor.cpu(), before[name]) for name, tensor in factor.kept.items())
    assert (model[0].weight.detach().cpu() - on_cpu).abs().max() <= 2**-7 * on_cpu.abs().max()


def test_float16_autocast_with_a_scaler() -> None:
    model = network(torch.float32)
    compiled = torch.compile(model, backend="poetx", options={"block_size": 64})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        x, target = batch(0, torch.float32)
        with torch.autocast("cuda", torch.float16):
            loss = F.mse_loss(compiled(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("mode", ("reduce-overhead", "max-autotune"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_cuda_graphs_train_as_ordinary_launches_do(mode: str, dtype: torch.dtype) -> None:
    """Weights, permutations and residuals keep their storage, so that a recorded graph reads what was folded."""
    models = {name: network(dtype) for name in ("default", mode)}
    for name, model in models.items():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=partial(poetx, mode=name, options={"updates": "given"}))
        train(compiled, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6), dtype, range(8))
        assert factor_of(model[0].weight).steps == 8
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(models[mode].parameters(), models["default"].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_stacks_and_kernels_take_a_step_as_the_cpus(dtype: torch.dtype) -> None:
    models = {"cpu": Experts(dtype)}
    models["cuda"] = copy.deepcopy(models["cpu"]).cuda()
    x = torch.randn(64, 22, generator=torch.Generator().manual_seed(0)).to(dtype)
    for device, model in models.items():
        options = {"block_size": 16, "include_conv": True, "inner": "aot_eager", "updates": "given"}
        compiled = torch.compile(model, backend="poetx", options=options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        compiled(x.to(device)).float().square().mean().backward()
        optimizer.step()
        assert factor_of(model.experts).stack.count == 3
    for ours, theirs in zip(models["cuda"].parameters(), models["cpu"].parameters(), strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("settings", ({"foreach": True}, {"fused": True}, {"capturable": True}), ids=str)
def test_kinds_of_adam(settings: dict[str, bool]) -> None:
    model = network(torch.bfloat16)
    compiled = torch.compile(model, backend="poetx", options={"block_size": 64})
    before = model[0].weight.detach().clone()
    train(compiled, torch.optim.AdamW(model.parameters(), lr=1e-2, **settings), torch.bfloat16, range(3))
    assert not torch.equal(model[0].weight, before)
    assert torch.allclose(compiled(batch(0, torch.bfloat16)[0]), model(batch(0, torch.bfloat16)[0]), atol=5e-2)


def test_a_fold_that_finds_no_memory_runs_on_the_host() -> None:
    layout = BlockLayout.of(4096, 64, 32)
    channels = layout.channels(0, 0, 0).cuda()
    turn = naive.cayley_neumann(torch.randn(layout.skew, device="cuda", dtype=torch.float64) * 1e-2, 64, 1.0)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.float64)
    expected = weight.cpu()
    naive.rotate_(expected, None, turn.cpu(), channels.cpu(), turn.cpu(), channels.cpu())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        rotate_(weight, None, turn, channels, turn, channels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(weight.cpu(), expected)
