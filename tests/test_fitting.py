"""``memory=`` in training: what is chosen at the first graph, said, kept and resumed; and what is refused."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from poetx_compile import PoetxConfig, PoetxError, fitting, prepare, report, restore
from poetx_compile.estimate import estimate, trace
from poetx_compile.ladder import MARGIN, Chosen
from poetx_compile.optim import SkewMuon
from poetx_compile.registry import factors

OPTIONS = {"block_size": 32, "inner": "aot_eager"}


@pytest.fixture(autouse=True)
def no_model_is_left() -> Iterator[None]:
    """One with gradients and no optimizer would be warned of in the next test."""
    yield
    torch._dynamo.reset()
    gc.collect()


class Net(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512, dtype=torch.bfloat16)
        self.second = nn.Linear(512, 256, dtype=torch.bfloat16)
        self.third = nn.Linear(256, 512, dtype=torch.bfloat16)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.silu(self.first(x)))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.third(F.silu(x))


def batch() -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


def peak(optimizer: str = "AdamW", **options: Any) -> float:
    """Gigabytes that just suffice for these settings."""
    config = PoetxConfig(**OPTIONS | options)
    traced = trace(Net, lambda net: net(torch.zeros(64, 256, dtype=torch.bfloat16)).float().square().mean(), config)
    return estimate(traced).total / (1 - MARGIN) / 1e9


FOLDED = 1.05 * peak()
INT8 = 1.05 * peak(storage="int8")
assert peak() > INT8


def compiled(model: nn.Module, memory: Any, **options: Any) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS | {"memory": memory} | options)


def step(run: Any, optimizer: torch.optim.Optimizer) -> None:
    run(batch()).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def settings(model: nn.Module) -> set[tuple[str, str, float]]:
    return {
        (factor.storage, factor.config.skew_dtype, factor.config.activation_memory_budget)
        for factor in factors.of_module(model)
    }


@pytest.mark.parametrize(("memory", "storage"), [(FOLDED, "folded"), (INT8, "int8")])
def test_what_fits_is_what_trains(memory: float, storage: str) -> None:
    model = Net()
    run, optimizer = compiled(model, memory), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        step(run, optimizer)
    assert settings(model) == {(storage, "float32", 1.0)}
    assert all(bool(torch.isfinite(weight.detach()).all()) for weight in model.parameters())


def test_what_was_chosen_trains_as_if_it_had_been_named() -> None:
    trained = []
    for options in ({"memory": INT8}, {"storage": "int8"}):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Net()
        run = torch.compile(model, backend="poetx", options=OPTIONS | options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            step(run, optimizer)
        trained.append([weight.detach().clone() for weight in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_a_setting_that_was_named_stays() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(compiled(model, INT8, storage="folded"), optimizer)
    assert settings(model) == {("folded", "bfloat16", 1.0)}


def test_random_numbers_and_weights_are_as_without_it() -> None:
    before = torch.get_rng_state()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    start = torch.get_rng_state()
    compiled(model, FOLDED)(batch())
    assert torch.equal(torch.get_rng_state(), start)
    assert not torch.equal(before, start)
    assert optimizer.state == {}


def test_is_said_once_and_stands_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    run, optimizer = compiled(model, INT8), torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.INFO, "poetx_compile"):
        for _ in range(3):
            step(run, optimizer)
    said = [record.getMessage() for record in caplog.records if "takes storage" in record.getMessage()]
    assert len(said) == 1
    for part in ("storage=int8", "skew_dtype=float32", "activation_memory_budget=1.0", "weights", "activations", "scratch"):
        assert part in said[0]
    assert "assum" not in said[0]
    assert str(report(model, show=False).chosen) == said[0]
    assert " ".join(said[0].split()[:6]) in str(report(model, show=False))


def test_a_report_without_memory_says_nothing_of_it() -> None:
    model = Net()
    found = prepare(model, batch(), options=OPTIONS)
    assert found.chosen is None
    assert "memory" not in str(found)


def test_without_an_optimizer_adamws_states_are_assumed_and_said() -> None:
    found = prepare(Net(), batch(), options=OPTIONS | {"memory": FOLDED}).chosen
    assert found.estimate.total == estimate_of(torch.optim.AdamW).total
    assert "with AdamW's states, since no optimizer holds these parameters yet" in str(found)


def estimate_of(kind: Any, **arguments: Any) -> Any:
    torch._dynamo.reset()
    model = Net()
    optimizer = kind(model.parameters(), **arguments)
    chosen = prepare(model, batch(), options=OPTIONS | {"memory": 1.0}, optimizer=None).chosen
    assert optimizer is not None
    return chosen.estimate


def test_the_states_of_known_optimizers_are_counted() -> None:
    adamw = estimate_of(torch.optim.AdamW).states
    assert estimate_of(torch.optim.SGD).states == 0
    assert estimate_of(torch.optim.SGD, momentum=0.9).states == adamw / 2
    assert estimate_of(torch.optim.Adam, amsgrad=True).states == adamw * 3 / 2
    assert adamw / 2 < estimate_of(SkewMuon).states < adamw


def test_an_unknown_optimizer_is_taken_for_adamw_and_said() -> None:
    model = Net()
    optimizer = torch.optim.Adagrad(model.parameters())
    step(compiled(model, FOLDED), optimizer)
    assert "with AdamW's states for Adagrad" in str(report(model, show=False).chosen)


def test_nothing_that_fits_is_refused_before_a_weight_is_touched() -> None:
    model = Net()
    before = [weight.detach().clone() for weight in model.parameters()]
    sentence = "no settings fit memory=0.0001 .*The leanest, storage=.*of 0.0001 GB.*shorter sequence, a smaller batch"
    with pytest.raises(BackendCompilerFailed, match=sentence):
        compiled(model, 0.0001)(batch())
    with pytest.raises(PoetxError, match="no settings fit"):
        prepare(model, batch(), options={"memory": 0.0001})
    assert not factors.of_module(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_auto_is_for_a_gpu() -> None:
    sentence = "memory='auto' is what a GPU has, and this model is on cpu: give gigabytes, memory=24"
    with pytest.raises(PoetxError, match=sentence):
        prepare(Net(), batch(), options={"memory": "auto"})


def test_other_graphs_keep_what_the_first_chose() -> None:
    """A longer batch, evaluation, and compiling again."""
    model = Net()
    run, optimizer = compiled(model, INT8), torch.optim.AdamW(model.parameters())
    step(run, optimizer)
    run(torch.cat([batch()] * 64))
    with torch.no_grad():
        run(batch()[:3])
    torch._dynamo.reset()
    step(compiled(model, FOLDED), optimizer)
    assert settings(model) == {("int8", "float32", 1.0)}


def test_weights_converted_without_memory_keep_their_settings_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    prepare(model, batch(), options=OPTIONS | {"storage": "int8"})
    torch._dynamo.reset()
    step(compiled(model, FOLDED), torch.optim.AdamW(model.parameters()))
    assert settings(model) == {("int8", "float32", 1.0)}
    assert f"memory={FOLDED} chooses nothing: weights of this model were converted before, with storage=int8" in caplog.text


def test_restored_weights_are_chosen_for_anew() -> None:
    model = Net()
    prepare(model, batch(), options=OPTIONS | {"memory": INT8})
    restore(model)
    torch._dynamo.reset()
    prepare(model, batch(), options=OPTIONS | {"memory": FOLDED})
    assert settings(model) == {("folded", "float32", 1.0)}


def test_prepare_chooses_for_training_too() -> None:
    model = Net()
    prepare(model, batch(), options=OPTIONS | {"memory": INT8})
    chosen = report(model, show=False).chosen
    assert isinstance(chosen, Chosen)
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters())
    step(compiled(model, INT8), optimizer)
    assert settings(model) == {("int8", "float32", 1.0)}
    assert report(model, show=False).chosen == chosen


@pytest.mark.parametrize("dynamic", [None, True])
def test_symbolic_sizes_are_estimated_by_what_they_are_now_and_stay_symbolic(dynamic: bool | None) -> None:
    graphs = []
    for options in ({}, {"memory": 1.0}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = nn.Sequential(nn.Linear(256, 512), nn.Dropout(0.1), nn.SiLU(), nn.Linear(512, 256))
        run = torch.compile(model, backend="poetx", options=OPTIONS | options, dynamic=dynamic)
        optimizer = torch.optim.AdamW(model.parameters())
        for rows in (32, 48, 7, 90):
            run(torch.randn(rows, 256)).square().mean().backward()
            optimizer.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
    assert report(model, show=False).chosen.estimate.saved == 32 * (256 + 512 + 512 + 256) * 4 + 32 * 512


def test_graph_breaks_count_all_parameters_and_say_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    whole = prepare(Net(), batch(), options=OPTIONS | {"memory": 1.0}).chosen.estimate
    torch._dynamo.reset()
    model = Net(breaks=True)
    with caplog.at_level(logging.WARNING, "poetx_compile"):
        chosen = prepare(model, batch(), options=OPTIONS | {"memory": 1.0}).chosen
    assert (chosen.estimate.weights, chosen.estimate.states, chosen.estimate.q) == (whole.weights, whole.states, whole.q)
    assert chosen.estimate.saved < whole.saved
    assert "2 parameters are in later graphs" in caplog.text
    assert len(settings(model)) == 1


def test_a_model_whose_parameters_method_takes_arguments_is_counted() -> None:
    class Grouped(Net):
        def parameters(self, group: str) -> Iterator[nn.Parameter]:  # type: ignore[override]
            return nn.Module.parameters(self)

    model = Grouped()
    optimizer = torch.optim.AdamW(model.parameters("all"))
    run = compiled(model, INT8)
    step(run, optimizer)
    assert {factor.storage for weight in model.parameters("all") if (factor := factors.of_weight(weight))} == {"int8"}


def test_a_graph_that_cannot_be_estimated_is_refused_before_a_weight_is_touched() -> None:
    class Selecting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[(x[:, 0] > 0).nonzero().squeeze(1)])

    model = Selecting()
    sentence = r"memory=1.0 needs an estimate, .* leave memory out, and set storage"
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(BackendCompilerFailed, match=sentence),
    ):
        compiled(model, 1.0)(batch())
    assert not factors.of_module(model)


def test_parameters_that_the_graph_does_not_rotate_are_not_taken_for_rotated() -> None:
    """A tied head, a frozen layer: what an estimate says is converted is what is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(256, 128)
            self.inner = nn.Linear(128, 128)
            self.frozen = nn.Linear(128, 128).requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.frozen(self.inner(self.embedding(ids)))
            return F.cross_entropy(hidden @ self.embedding.weight.t(), ids)

    model = Tied()
    found = prepare(model, torch.arange(100), options=OPTIONS | {"memory": 1.0})
    assert (
        found.chosen.estimate.converted == found.coverage == pytest.approx(128 * 128 / (256 * 128 + 2 * (128 * 128 + 128)))
    )
    assert found.chosen.estimate.weights == found.after.weights


@pytest.mark.gpu
def test_auto_is_what_the_card_has_and_estimating_takes_none_of_it() -> None:
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    taken = []
    estimate_whole = fitting.choose

    def watched(*arguments: Any) -> Chosen:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        chosen = estimate_whole(*arguments)
        taken.append(torch.cuda.max_memory_allocated() - before)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "choose", watched)
        run = torch.compile(model, backend="poetx", options={"memory": "auto", "block_size": 32})
        run(batch().cuda()).float().square().mean().backward()
    optimizer.step()
    smallest = min(weight.nbytes for weight in model.parameters() if weight.ndim == 2)
    assert len(taken) == 1 and taken[0] < smallest / 16  # Inductor makes its patterns of a few small tensors, once
    assert settings(model) == {("folded", "float32", 1.0)}
    chosen = report(model, show=False).chosen
    share = torch.cuda.get_per_process_memory_fraction()
    assert chosen.limit == torch.cuda.get_device_properties(0).total_memory * share
    assert "memory=auto takes" in str(chosen)


class TestResume:
    def checkpoint(self, memory: float) -> tuple[dict[str, Any], dict[str, Any]]:
        model = Net()
        run, optimizer = compiled(model, memory), torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            step(run, optimizer)
        saved = {key: value.clone() for key, value in model.state_dict().items()}, optimizer.state_dict()
        torch._dynamo.reset()
        return saved

    def test_on_another_card_goes_on_with_the_settings_that_were_saved(self) -> None:
        weights, state = self.checkpoint(INT8)
        trained = []
        for options in ({"memory": FOLDED}, {"memory": INT8}, {"storage": "int8"}):
            torch._dynamo.reset()
            resumed = Net()
            resumed.load_state_dict(weights)
            optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
            optimizer.load_state_dict(copy.deepcopy(state))
            step(torch.compile(resumed, backend="poetx", options=OPTIONS | options), optimizer)
            assert settings(resumed) == {("int8", "float32", 1.0)}
            trained.append([weight.detach().clone() for weight in resumed.parameters()])
        assert all(map(torch.equal, trained[0], trained[2]))
        assert all(map(torch.equal, trained[1], trained[2]))

    def test_on_a_card_that_is_too_small_is_refused(self) -> None:
        weights, state = self.checkpoint(FOLDED)
        resumed = Net()
        resumed.load_state_dict(weights)
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
        optimizer.load_state_dict(state)
        with pytest.raises(BackendCompilerFailed, match=r"no settings fit memory=.*The leanest, storage=folded"):
            compiled(resumed, INT8 / 2)(batch())
        assert not factors.of_module(resumed)

    def test_state_that_comes_after_another_choice_is_refused(self) -> None:
        weights, state = self.checkpoint(INT8)
        resumed = Net()
        resumed.load_state_dict(weights)
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
        prepare(resumed, batch(), options=OPTIONS | {"memory": FOLDED})
        optimizer.load_state_dict(state)
        run = compiled(resumed, FOLDED)
        with pytest.raises(
            PoetxError, match=r"with storage=int8, this run asks for folded; pass options=.'storage': 'int8'."
        ):
            step(run, optimizer)
