"""Training with weights that are stored lean: the same trajectory as by folding, compiled or not, and exact resume."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers import OPTIONS, Block, factor_of, loss, network, rotating, train, values
from torch import Tensor, nn, optim
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import poetx_compile
from poetx_compile import PoetxConfig, PoetxError, PoetxWarning, conversion, stand_in
from poetx_compile.base import BASES
from poetx_compile.stand_in import StandIn

of_storages = pytest.mark.parametrize("storage", BASES)
HALF = torch.bfloat16


def lean_network(storage: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    """:func:`network` with its weights stored lean, whatever their dtype: a run would do so with half-precision ones only."""
    model = network(dtype)
    config = PoetxConfig(**OPTIONS | {"storage": storage} | options)
    for name in ("0", "2"):
        factor = conversion.adopt(model[int(name)].weight, f"{name}.weight", config, storage=storage)
        stand_in.pack([factor])
    return model


def stored(model: nn.Sequential) -> list[Tensor]:
    """All that makes up the model, bit by bit."""
    lean = [factor_of(model[place].weight) for place in (0, 2)]
    return [tensor.clone() for factor in lean for tensor in factor.kept.values()] + values(model)


def run_of(model: nn.Module, storage: str, rate: float = 1e-2, **options: Any) -> tuple[Any, optim.Optimizer]:
    return rotating(model, storage=storage, **options), optim.AdamW(model.parameters(), rate)


# --- The trajectory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "period"), [("int8", 0), ("bf16-lean", 0), ("bf16-lean", 3)])
@pytest.mark.parametrize("compiled", [True, False])
def test_it_is_the_trajectory_of_folding(storage: str, period: int, compiled: bool) -> None:
    """In float64, from the very same start: rotations that are multiplied make the weight that is folded at each step.

    New permutations write the weight back as the base, exactly in float64; int8 rounds it, as a test below says.
    """
    options = {"storage": storage, "permutation_period": period}
    lean = lean_network(storage, permutation_period=period)
    folded = network()
    folded.load_state_dict(lean.state_dict())
    runs = []
    for model, its in ((lean, options), (folded, {"permutation_period": period})):
        optimizer = optim.AdamW(model.parameters(), 1e-2)
        run = rotating(model, **its)
        loss(run, 0).backward()
        optimizer.zero_grad()
        train(run if compiled else model, optimizer, range(20))
        runs.append(values(model))
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@of_storages
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_half_precision_weights_are_stored_lean_and_learn(storage: str, inner: str) -> None:
    """int8 starts from a rounded weight: its losses differ by as much as that changes the model, and no more."""
    losses: dict[str, list[float]] = {}
    for its in ("folded", storage):
        model = network(HALF)
        run, optimizer = rotating(model, storage=its, inner=inner), optim.AdamW(model.parameters(), 1e-2)
        losses[its] = []
        for step in range(12):
            value = loss(run, step % 3, HALF)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[its].append(value.item())
    assert [type(parameter) is StandIn for parameter in model.parameters()] == [True, False, True, False, False]
    assert sum(losses[storage][-3:]) < 0.9 * sum(losses[storage][:3])
    allowed = 0.05 if storage == "int8" else 0.02
    assert max(abs(a - b) for a, b in zip(losses["folded"], losses[storage])) < allowed


@of_storages
def test_rotations_do_not_leave_the_orthogonal_matrices(storage: str) -> None:
    model = network(HALF)
    run, optimizer = rotating(model, storage=storage), optim.SGD(model.parameters(), 0.5)
    train(run, optimizer, range(300))
    for place in (0, 2):
        factor = factor_of(model[place].weight)
        for turn in (factor.base.rows, factor.base.columns):
            defect = turn + turn.mT + turn.mT @ turn
            assert turn.abs().max() > 0.1
            assert defect.abs().max() < 2e-6


@of_storages
def test_codes_never_change_without_new_permutations(storage: str) -> None:
    model = network(HALF)
    run, optimizer = rotating(model, storage=storage), optim.AdamW(model.parameters(), 1e-2)
    train(run, optimizer, range(1))
    base = factor_of(model[0].weight).base
    held = base.stored.data_ptr(), base.stored.clone(), None if base.scales is None else base.scales.clone()
    spectrum = torch.linalg.svdvals(factor_of(model[0].weight).made(torch.float32).weight())
    train(run, optimizer, range(1, 40))
    assert base.stored.data_ptr() == held[0]
    assert torch.equal(base.stored, held[1])
    assert held[2] is None or torch.equal(base.scales, held[2])
    after = torch.linalg.svdvals(factor_of(model[0].weight).made(torch.float32).weight())
    torch.testing.assert_close(after, spectrum, rtol=0, atol=2e-6 * spectrum.max().item())


@of_storages
def test_new_permutations_write_the_weight_back_as_the_base(storage: str) -> None:
    model = network(HALF)
    run, optimizer = rotating(model, storage=storage, permutation_period=5), optim.AdamW(model.parameters(), 1e-2)
    train(run, optimizer, range(4))
    factor = factor_of(model[0].weight)
    channels, codes = factor.row_channels.clone(), factor.base.stored.clone()
    loss(run, 4, HALF).backward()
    seen = {}
    write = factor.base.write

    def noting(matrix: Tensor, seed: int | None = None) -> None:
        seen["exact"], seen["seed"] = matrix.clone(), seed
        write(matrix, seed)

    factor.base.write = noting
    optimizer.step()
    assert factor.epoch == 1
    assert seen["seed"] is not None
    assert not torch.equal(factor.row_channels, channels)
    assert not torch.equal(factor.base.stored, codes)
    assert not factor.base.rows.any()
    moved = (factor.made(torch.float32).weight() - seen["exact"]).abs().max()
    assert moved <= seen["exact"].abs().max() * (1.02 / 127 if storage == "int8" else 2**-7)
    train(run, optimizer, range(5, 8))


# --- Which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_stay_folded(dtype: torch.dtype) -> None:
    model = network(dtype)
    loss(rotating(model, storage="int8"), 0, dtype).backward()
    assert factor_of(model[0].weight).storage == "folded"
    assert type(model[0].weight) is nn.Parameter


def test_weights_that_are_used_in_other_ways_stay_folded_and_the_report_says_so() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(22, 32, dtype=HALF)
            self.scaled = nn.Linear(32, 20, dtype=HALF)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.plain(x), self.scaled.weight * 2)

    model = Other()
    loss(rotating(model, storage="int8"), 0, HALF).backward()
    assert factor_of(model.plain.weight).storage == "int8"
    assert factor_of(model.scaled.weight).storage == "folded"
    how = {row.name: row.how for row in poetx_compile.report(model, show=False).rows}
    assert "int8" in how["plain.weight"]
    assert "int8" not in how["scaled.weight"]
    assert "folded" in how["scaled.weight"]


def test_a_lean_weight_may_be_used_in_other_ways_later() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(22, 20, dtype=HALF)

        def forward(self, x: Tensor, penalty: bool) -> Tensor:
            y = self.layer(x)
            return y + self.layer.weight.float().square().sum(1) if penalty else y

    model = Other()
    run, _optimizer = run_of(model, "int8")
    x = torch.ones(3, 22, dtype=HALF)
    for penalty in (False, False, True):
        run(x, penalty).sum().backward()
    assert type(model.layer.weight) is StandIn
    both = model.layer.weight.grad.clone()
    model.zero_grad()
    for penalty in (False, False, True):
        model(x, penalty).sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, both, rtol=0.02, atol=0.02 * both.abs().max().item())


def test_compiled_code_that_writes_to_a_lean_weight_is_refused() -> None:
    model = network(HALF)
    loss(rotating(model, storage="int8"), 0, HALF).backward()

    @torch.compile(backend="poetx", options=OPTIONS | {"storage": "int8"})
    def shrink(weight: Tensor) -> Tensor:
        with torch.no_grad():
            return weight.mul_(0.5)

    with pytest.raises(Exception, match="compiled code writes to"):
        shrink(model[0].weight)


@pytest.mark.parametrize(("option", "value"), [("route", "dense"), ("residual_bits", 4)])
def test_settings_that_contradict_it_are_refused(option: str, value: Any) -> None:
    with pytest.raises(PoetxError, match="storage='int8'"):
        PoetxConfig(**{"storage": "int8", option: value})


def test_an_unknown_storage_is_refused_with_the_choices() -> None:
    with pytest.raises(PoetxError, match="'storage' must be one of folded, int8, bf16-lean"):
        PoetxConfig(storage="int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_moves_between_a_refused_call_and_the_next(dtype: torch.dtype) -> None:
    """What was converted, and not stored lean for the numbers in it, follows its weight."""
    model = network(HALF)
    right = model[2].weight.detach().clone()
    run = rotating(model, storage="int8")
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(PoetxError, match="NaN"):
        loss(run, 0, HALF)
    with torch.no_grad():
        model[2].weight.copy_(right)
    model.to(dtype)
    expected = loss(copy.deepcopy(model), 0, dtype)
    found = loss(run, 0, dtype)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for place in (0, 2):
        assert type(model[place].weight) is StandIn
        assert factor_of(model[place].weight).residual is None
        assert factor_of(model[place].weight).dtype == dtype
    torch.testing.assert_close(loss(run, 1, dtype), loss(model, 1, dtype))


# --- Compiling -------------------------------------------------------------------------------------------------------


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from poetx_compile import backend

    seen: list[int] = []
    compile_inner = backend._compile

    def counting(gm: Any, *others: Any) -> Any:
        seen.append(len(gm.graph.nodes))
        return compile_inner(gm, *others)

    monkeypatch.setattr(backend, "_compile", counting)
    return seen


def test_one_graph_is_compiled_and_no_step_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    model = network(HALF)
    run, optimizer = rotating(model, storage="int8"), optim.AdamW(model.parameters(), 1e-2)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        train(run, optimizer, range(6))
    assert len(seen) == 1


def test_the_first_call_is_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    run = rotating(network(HALF), storage="int8", inner="inductor")
    with torch.profiler.profile() as profile:
        loss(run, 0, HALF).backward()
    assert len(seen) == 1
    assert any("CompiledFunction" in event.name for event in profile.events())


def test_a_graph_for_other_settings_of_torch_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    run = rotating(network(HALF), storage="int8")
    loss(run, 0, HALF).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss(run, 0, HALF).backward()
    loss(run, 0, HALF).backward()
    assert len(seen) == 2


def test_a_graph_for_other_shapes_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    run = rotating(network(HALF), storage="int8")
    for size in (8, 5, 7, 8):
        run(torch.ones(size, 22, dtype=HALF)).sum().backward()
    assert len(seen) == 2


def test_a_name_that_stands_for_another_function_by_now_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cell of a notebook makes it that is run again, with a function that Dynamo leaves in the graph."""

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return act(super().forward(x))  # type: ignore[name-defined]  # noqa: F821

    model = Net(32, 32, dtype=HALF)
    run, x = rotating(model, storage="bf16-lean"), torch.ones(4, 32, dtype=HALF)
    for act_now in (lambda x: x * 1, lambda x: x * 3):
        act_now.__name__ = "act"
        monkeypatch.setitem(globals(), "act", torch._dynamo.allow_in_graph(act_now))
        for _ in range(2):
            torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("same", [True, False])
def test_another_choice_of_what_a_checkpoint_keeps_is_compiled_anew(same: bool) -> None:
    asked = []

    def keep(*operands: Any, **by_name: Any) -> CheckpointPolicy:
        asked.append("keep")
        return CheckpointPolicy.MUST_SAVE

    def recompute(*operands: Any, **by_name: Any) -> CheckpointPolicy:
        asked.append("recompute")
        return CheckpointPolicy.MUST_RECOMPUTE

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False, context_fn=self.keeps)

    models = [Net(32, 32, dtype=HALF)] * 2 if same else [Net(32, 32, dtype=HALF) for _ in range(2)]
    for model, policy in zip(models, (keep, recompute)):
        model.keeps = partial(create_selective_checkpoint_contexts, policy)
        asked.clear()
        run = rotating(model, storage="bf16-lean")
        for _ in range(2):
            run(torch.ones(4, 32, dtype=HALF)).sum().backward()
        assert set(asked) == {policy.__name__}


def test_blocks_compiled_one_by_one_share_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    blocks = [Block().to(HALF) for _ in range(12)]
    runs = [rotating(block, storage="int8") for block in blocks]
    for _ in range(3):
        for run in runs:
            loss(run, 0, HALF).backward()
    assert len(seen) == 1
    assert all(type(block.layers[0].weight) is StandIn for block in blocks)


def test_prepared_weights_compile_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    model = network(HALF)
    poetx_compile.prepare(model, torch.ones(8, 22, dtype=HALF), options=OPTIONS | {"storage": "int8"})
    assert type(model[0].weight) is StandIn
    loss(rotating(model, storage="int8"), 0, HALF).backward()
    assert len(seen) == 1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network(HALF)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Block, Checkpointed])
def test_the_gradient_is_that_of_eager_training(kind: type[nn.Module]) -> None:
    model: Any = kind().to(HALF)
    run, _optimizer = run_of(model, "int8")
    for _ in range(2):
        loss(run, 0, HALF).backward()
    model.zero_grad()
    loss(run, 1, HALF).backward()
    compiled = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss(model, 1, HALF).backward()
    for got, parameter in zip(compiled, model.parameters()):
        torch.testing.assert_close(got, parameter.grad, rtol=0.02, atol=0.02 * parameter.grad.abs().max().item())


@of_storages
def test_evaluation_without_gradients_uses_the_weight(storage: str) -> None:
    model = network(HALF)
    run, optimizer = rotating(model, storage=storage), optim.AdamW(model.parameters(), 1e-2)
    train(run, optimizer, range(3))
    x = torch.ones(5, 22, dtype=HALF)
    ordinary = copy.deepcopy(model)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(x), ordinary(x))
            assert torch.equal(model(x), ordinary(x))
    frozen = [parameter.requires_grad_(False) for parameter in model.parameters()]
    assert torch.equal(run(x), ordinary(x))
    assert all(parameter.grad is None for parameter in frozen)


def test_another_backend_sees_the_weight() -> None:
    model = network(HALF)
    loss(rotating(model, storage="int8"), 0, HALF).backward()
    x = torch.ones(5, 22, dtype=HALF)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x), rtol=0, atol=0)


# --- Around it -------------------------------------------------------------------------------------------------------


@of_storages
@pytest.mark.parametrize("order", ["model first", "optimizer first", "after a forward"])
@pytest.mark.parametrize(("period", "inner"), [(0, "aot_eager"), (2, "aot_eager"), (2, "inductor")])
def test_a_resumed_run_goes_on_bit_by_bit(storage: str, order: str, period: int, inner: str) -> None:
    options = {"permutation_period": period, "inner": inner}
    model = network(HALF)
    run, optimizer = run_of(model, storage, **options)
    train(run, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(run, optimizer, range(5, 9))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch._dynamo.reset()
    again = network(HALF)
    nn.init.normal_(again[0].weight)
    run, optimizer = run_of(again, storage, **options)
    if order == "after a forward":
        loss(run, 0, HALF).backward()
        optimizer.zero_grad()
    if order == "optimizer first":
        optimizer.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["model"])
    if order != "optimizer first":
        optimizer.load_state_dict(saved["optimizer"])
    train(run, optimizer, range(5, 9))
    for one, other in zip(stored(again), stored(model)):
        assert torch.equal(one, other)


@of_storages
def test_state_of_another_weight_is_not_taken_for_its_own(storage: str) -> None:
    model = network(HALF)
    run, optimizer = run_of(model, storage)
    train(run, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = network(HALF)
    run, optimizer = run_of(other, storage)
    optimizer.load_state_dict(saved)
    with pytest.warns(
        PoetxWarning, match="is not the weight that this optimizer state was saved with: it stays as it was rounded"
    ):
        loss(run, 0, HALF).backward()
    torch.testing.assert_close(other[0].weight.detach(), network(HALF)[0].weight.detach(), rtol=0.01, atol=0.01)


def test_a_checkpoint_of_another_storage_is_refused() -> None:
    model = network(HALF)
    run, optimizer = run_of(model, "folded")
    train(run, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = network(HALF)
    other.load_state_dict(saved[0])
    torch._dynamo.reset()
    run, optimizer = run_of(other, "int8")
    optimizer.load_state_dict(saved[1])
    before = values(other)
    with pytest.raises(PoetxError, match=r"was trained with storage=folded, this run asks for int8"):
        loss(run, 0, HALF)
    assert all(torch.equal(now, then) for now, then in zip(values(other), before))


@of_storages
def test_a_copy_of_model_and_optimizer_trains_on_its_own(storage: str) -> None:
    model = network(HALF)
    run, optimizer = run_of(model, storage)
    train(run, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(run, optimizer, range(3, 6))
    train(rotating(twin, storage=storage), twin_optimizer, range(3, 6))
    for one, other in zip(stored(twin), stored(model)):
        assert torch.equal(one, other)


def test_clipping_and_zeroing_reach_the_rotation() -> None:
    model = network(HALF)
    run, optimizer = run_of(model, "int8")
    loss(run, 0, HALF).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.stack([parameter.grad.float().norm() for parameter in model.parameters()]).norm()
    assert clipped <= 1.01e-3
    optimizer.zero_grad()
    assert factor_of(model[0].weight).q.grad is None


def test_a_step_that_was_never_folded_leaves_the_weight() -> None:
    model = network(HALF)
    run, optimizer = run_of(model, "int8")
    train(run, optimizer, range(2))
    before = stored(model)
    factor = factor_of(model[0].weight)
    with torch.no_grad():
        factor.q.fill_(0.1)
    loss(run, 2, HALF)
    assert factor.is_clean
    assert all(torch.equal(one, other) for one, other in zip(stored(model), before))


@of_storages
def test_a_ruined_step_leaves_the_weight(storage: str) -> None:
    model = network(HALF)
    run, optimizer = run_of(model, storage)
    train(run, optimizer, range(2))
    before = stored(model)
    loss(run, 2, HALF).backward()
    for place in (0, 2):
        model[place].weight.grad.fill_(float("nan"))
    with pytest.warns(PoetxWarning, match="NaN or infinite"):
        optimizer.step()
    kept = len(factor_of(model[0].weight).kept) + len(factor_of(model[2].weight).kept)
    for one, other in zip(stored(model)[:kept], before[:kept]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    model = network(HALF)
    run, optimizer = rotating(model, storage="int8"), optim.AdamW(model.parameters(), 1e-2, fused=fused)
    train(run, optimizer, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, steps = stored(model), factor_of(model[0].weight).steps
    scaler.scale(loss(run, 2, HALF)).backward()
    model[0].weight.grad[3] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert factor_of(model[0].weight).steps == steps
    assert all(torch.equal(one, other) for one, other in zip(stored(model), before))
    scaler.scale(loss(run, 2, HALF)).backward()
    scaler.step(optimizer)
    assert factor_of(model[0].weight).steps == steps + 1
    assert not torch.equal(model[0].weight, before[-5])


def test_an_exported_model_holds_ordinary_weights() -> None:
    model = network(HALF)
    run, optimizer = run_of(model, "int8")
    train(run, optimizer, range(3))
    x = torch.ones(3, 22, dtype=HALF)
    exported = torch.export.export(model.eval(), (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    again = torch.export.load(file)
    assert not any("poetx" in str(node.target) for node in again.graph.nodes)
    with torch.no_grad():
        assert torch.equal(again.module()(x), model(x))


def test_a_model_moves_with_its_rotations() -> None:
    """To a device that this machine has; ``tests/test_gpu.py`` has more."""
    model = network(HALF)
    run, optimizer = run_of(model, "int8")
    train(run, optimizer, range(3))
    before = stored(model)
    model.to("cpu").to(HALF)
    assert all(torch.equal(one, other) for one, other in zip(stored(model), before))
    train(run, optimizer, range(3, 5))


def test_restoring_ends_it() -> None:
    model = network(HALF)
    run, optimizer = run_of(model, "int8")
    train(run, optimizer, range(3))
    before = values(model)
    assert poetx_compile.restore(model) == ["0.weight", "2.weight"]
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(values(model), before))
    torch._dynamo.reset()
    train(torch.compile(model, backend="aot_eager"), optim.AdamW(model.parameters(), 1e-2), range(2))


@of_storages
def test_the_report_counts_what_is_stored(storage: str) -> None:
    model = network(HALF)
    run, optimizer = run_of(model, storage)
    train(run, optimizer, range(2))
    rows = {row.name: row for row in poetx_compile.report(model, show=False).rows}
    row, base = rows["0.weight"], factor_of(model[0].weight).base
    assert row.before.weights == 2 * 22 * 32
    numbers = 22 * 32 + 2 * 32 if storage == "int8" else 2 * 22 * 32
    assert row.after.weights == numbers
    assert row.after.residuals == base.nbytes - numbers
    assert storage in row.how


@pytest.mark.parametrize("storage", ["folded", *BASES])
def test_no_weight_is_kept_for_the_backward_pass(storage: str) -> None:
    """What the forward graph hands on beside its inputs: activations, and no matrix of the size of a weight."""
    graphs: dict[str, Any] = {}
    model = network(HALF)
    poetx_compile.prepare(model, torch.ones(3, 22, dtype=HALF), options=OPTIONS | {"storage": storage})

    def noting(name: str) -> Callable[[Any, Any], Any]:
        def compiler(graph: Any, inputs: Any) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    partition = aot_autograd(
        fw_compiler=noting("forward"), bw_compiler=noting("backward"), partition_fn=min_cut_rematerialization_partition
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poetx_compile.backend._compile", lambda gm, inputs, *_: partition(gm, inputs))
        loss(rotating(model, storage=storage), 0, HALF).backward()
    forward, backward = graphs["forward"], graphs["backward"]
    inputs = {node for node in forward.graph.nodes if node.op == "placeholder"}
    saved = [node for node in forward.graph.output_node().args[0] if isinstance(node, torch.fx.Node) and node not in inputs]
    matrices = [node for node in saved if node.meta["val"].numel() in (22 * 32, 32 * 20)]
    assert saved
    assert bool(matrices) == (storage == "folded")
    makes = [
        [node for node in graph.graph.nodes if node.target is torch.ops.poetx.effective.default]
        for graph in (forward, backward)
    ]
    assert [len(found) for found in makes] == ([0, 0] if storage == "folded" else [2, 2])
    for graph in (forward, backward):
        nodes = list(graph.graph.nodes)
        lives = [
            (nodes.index(node), max(nodes.index(user) for user in _users(node)))
            for node in nodes
            if node.target is torch.ops.poetx.effective.default
        ]
        assert all(first[1] < second[0] for first, second in itertools.pairwise(lives)), "two weights alive at once"


def _users(node: Any) -> list[Any]:
    """All that reads the memory of a node, views looked through."""
    found = []
    for user in node.users:
        found.append(user)
        if getattr(user.target, "is_view", False):
            found += _users(user)
    return found


def test_a_base_of_another_half_precision_than_its_weight_resumes() -> None:
    """``model.half()`` leaves the base in bfloat16."""
    other = torch.float16
    model = network(HALF)
    run, optimizer = rotating(model, storage="bf16-lean"), optim.SGD(model.parameters(), 0.01)
    train(run, optimizer, range(2))
    model.to(other)
    train(run, optimizer, range(2, 4))
    weights, states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch._dynamo.reset()
    resumed = network(HALF).to(other)
    restarted = optim.SGD(resumed.parameters(), 0.01)
    resumed.load_state_dict(weights)
    restarted.load_state_dict(states)
    loss(rotating(resumed, storage="bf16-lean"), 4, other)
    for now, then in zip(values(resumed), values(model)):
        torch.testing.assert_close(now, then, rtol=2**-10, atol=2**-14)


def test_prepare_refuses_before_any_weight_is_rounded() -> None:
    model = network(HALF)
    before = values(model)
    with pytest.raises(PoetxError, match="LBFGS cannot train the rotation"):
        poetx_compile.prepare(
            model,
            torch.randn(8, 22, dtype=HALF),
            optimizer=optim.LBFGS(model.parameters()),
            options=OPTIONS | {"storage": "int8"},
        )
    assert all(torch.equal(now, old) for now, old in zip(values(model), before))
