"""The estimate of a training step, against real models: what is allocated, and what compiled graphs really save."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from poetx_compile import PoetxConfig, PoetxError, report
from poetx_compile._torch.tensors import is_fake
from poetx_compile.base import BASES
from poetx_compile.estimate import estimate, trace
from poetx_compile.registry import factors

OPTIONS = {"block_size": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ),
    "gpt2": GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=640, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
Case = tuple[Callable[[], nn.Module], Callable[[Callable[..., Any]], Tensor]]


@pytest.fixture(autouse=True)
def no_model_is_left() -> Iterator[None]:
    """One with gradients and no optimizer would be warned of in the next test."""
    yield
    torch._dynamo.reset()
    gc.collect()


def case(name: str, dtype: torch.dtype, checkpointing: bool = False, tokens: int = 96) -> Case:
    def build() -> nn.Module:
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def loss(model: Callable[..., Any]) -> Tensor:
        ids = torch.zeros(2, tokens, dtype=torch.int64)
        return model(input_ids=ids, labels=ids).loss

    return build, loss


def trained(build: Callable[[], nn.Module], loss: Callable[[Callable[..., Any]], Tensor], **options: Any) -> nn.Module:
    model = build()
    compiled = torch.compile(model, backend="poetx", options=OPTIONS | options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(compiled).backward()
    optimizer.step()
    model.optimizer = optimizer  # keeps it alive for the report
    return model


def saved_bytes(model: nn.Module, compiled: Callable[..., Any], loss: Callable[[Callable[..., Any]], Tensor]) -> int:
    """What autograd keeps between forward and backward beside parameters, the factors' tensors and inputs."""
    kept: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(compiled)
    held = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        factor = factors.of_weight(parameter)
        held += [] if factor is None else factor.inputs.values()
    outside = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
    found = sum(size for storage, size in kept.items() if storage not in outside)
    value.backward()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_training_keeps_is_what_a_real_model_holds(name: str, dtype: torch.dtype) -> None:
    build, loss = case(name, dtype)
    traced = trace(build, loss, PoetxConfig(**OPTIONS))
    lean = {storage: trace(build, loss, PoetxConfig(storage=storage, **OPTIONS)) for storage in BASES}
    ways = [*((traced, {"residual_bits": bits}) for bits in (8, 4, 0)), *((lean[name], {"storage": name}) for name in BASES)]
    for graphs, way in ways:
        found = estimate(graphs, residual_bits=way.get("residual_bits", 8))
        torch._dynamo.reset()
        model = trained(build, loss, **way, inner="aot_eager")
        real = report(model, show=False)
        assert found.converted == real.coverage
        assert found.residuals == real.after.residuals
        converted = [factor for weight in model.parameters() if (factor := factors.of_weight(weight)) is not None]
        own = [(factor.q, factor.row_channels, factor.column_channels) for factor in converted]
        assert found.q == sum(tensor.nbytes for tensors in own for tensor in tensors)
        assert found.states == real.after.states - sum(factor.q.nbytes for factor in converted)  # which counts q there
        assert found.weights == real.after.weights + sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize(
    ("name", "checkpointing", "storage"),
    [(name, checkpointing, "folded") for name in CONFIGS for checkpointing in (False, True)]
    + [("llama", False, "int8"), ("llama", True, "int8"), ("gpt2", False, "bf16-lean")],
)
def test_what_the_forward_pass_saves_is_what_a_compiled_model_saves(name: str, checkpointing: bool, storage: str) -> None:
    build, loss = case(name, torch.bfloat16, checkpointing)
    options = OPTIONS | {"storage": storage}
    found = estimate(trace(build, loss, PoetxConfig(**options)))
    model = build()
    compiled = torch.compile(model, backend="poetx", options=options)
    assert found.saved == saved_bytes(model, compiled, loss)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_an_activation_budget_saves_less_and_keeps_the_gradients(inner: str) -> None:
    build, loss = case("llama", torch.float32)
    saved, gradients, start = [], [], build().state_dict()
    for budget in (1.0, 0.5, 0.1):
        torch._dynamo.reset()
        options = OPTIONS | {"activation_memory_budget": budget, "inner": inner}
        model = build()
        model.load_state_dict(start)
        model.optimizer = torch.optim.AdamW(model.parameters())  # without one, gradients of rotations are warned of
        saved.append(saved_bytes(model, torch.compile(model, backend="poetx", options=options), loss))
        gradients.append([weight.grad for weight in model.parameters()])
    assert saved[1] < 0.7 * saved[0]
    assert saved[2] < 0.3 * saved[0]
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_an_activation_budget_is_estimated(budget: float) -> None:
    build, loss = case("llama", torch.bfloat16)
    options = OPTIONS | {"activation_memory_budget": budget}
    found = estimate(trace(build, loss, PoetxConfig(**options)))
    model = build()
    assert found.saved == saved_bytes(model, torch.compile(model, backend="poetx", options=options), loss)


def test_of_several_graphs_the_backwards_are_listed_as_they_run() -> None:
    def build() -> nn.Module:
        return nn.ModuleList([nn.Linear(64, 96, bias=False), nn.Linear(96, 128, bias=False)])

    def loss(model: Any) -> Tensor:
        return model(torch.zeros(32, 64)).square().mean()

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = build()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    graphs = trace(Broken, loss, PoetxConfig(block_size=32)).graphs
    assert [name for name, _ in graphs.peaks] == ["forward", "forward", "backward", "backward"]
    tangents = [
        [node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder"][-1] for graph in graphs.backwards
    ]
    assert [shape[1] for shape in tangents] == [128, 96]


def test_nothing_is_allocated() -> None:
    """A layer of 40 GB."""

    def loss(model: Callable[..., Any]) -> Tensor:
        return model(torch.zeros(16, 100_000)).square().mean()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(trace(lambda: nn.Linear(100_000, 100_000), loss, PoetxConfig()))
    assert found.weights == 4 * (100_000**2 + 100_000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300, "MB"


def test_a_trace_leaves_no_trace() -> None:
    """The same model converts and trains afterwards, and no fake weight stands in a registry."""
    build, loss = case("llama", torch.float32)
    trace(build, loss, PoetxConfig(**OPTIONS))
    assert not any(is_fake(factor.weight) for factor in factors)
    model = trained(build, loss, inner="aot_eager")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_model_without_linear_layers_is_refused() -> None:
    def loss(model: Callable[..., Any]) -> Tensor:
        return F.mse_loss(model(torch.zeros(2, 8)), torch.zeros(2, 8))

    with pytest.raises(PoetxError, match="no linear layer of this model can be converted"):
        trace(lambda: nn.LayerNorm(8), loss, PoetxConfig(**OPTIONS))
    assert estimate(trace(lambda: nn.LayerNorm(8), loss, None)).weights == 64


class TestPeak:
    """Graphs small enough to count by hand."""

    def traced(self, **options: Any) -> Any:
        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False))

        return trace(build, lambda net: net(torch.zeros(32, 256)).square().mean(), **options)

    def test_of_a_step_is_gradients_and_what_the_optimizer_writes(self) -> None:
        found = estimate(self.traced(config=None))
        numbers = 2 * 256 * 512
        assert found.at == "step"
        assert (found.weights, found.states, found.gradients, found.scratch) == tuple(4 * n * numbers for n in (1, 2, 1, 1))

    def test_saved_are_the_outputs_and_inputs_of_layers(self) -> None:
        found = estimate(self.traced(config=PoetxConfig(**OPTIONS)))
        hidden, outside = 32 * 512 * 4, 32 * 256 * 4
        assert found.saved == 2 * hidden + 2 * outside
