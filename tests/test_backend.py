"""``torch.compile(model, backend="poetx")``: nothing of the model changes but the way its linear layers learn."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import factor_of, network, values
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import rotation_gradients
from spellings import CANONICAL, CHECKPOINTED, CONVOLUTIONS, INPUTS, STACKS, TRAINABLE, Spelling, Stack
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import poetx_compile
from poetx_compile.optim import SkewMuon
from poetx_compile.registry import factors

pytestmark = pytest.mark.filterwarnings("ignore:poetx. .* no torch.optim.Optimizer holds it")

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "block_size": 16}
Model = Callable[..., Tensor]


def rotating(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS | options)


def plain(model: Any, **settings: Any) -> Any:
    return torch.compile(model, backend="aot_eager", **settings)


def square(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A loss whose gradient is large everywhere."""
    return (y - 1).square().mean() if isinstance(y, Tensor) else square(torch.cat(y))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_against_oracle(model: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Every converted weight holds the gradient of its rotation."""
    expected = rotation_gradients(model, lambda call: square(call(x)))
    assert expected
    for name, gradient in expected.items():
        held = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(held, gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())


def check_against_eager(model: nn.Module, x: Tensor) -> None:
    """The input and every ordinary parameter hold the gradients that they have without compilation."""
    held = [
        x,
        *(parameter for parameter in model.parameters() if parameter.grad is not None and not factors.of_weight(parameter)),
    ]
    for tensor, gradient in zip(held, torch.autograd.grad(square(model(x)), held)):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-14)


def compilations() -> tuple[int, int]:
    """Graphs that reached a backend and frames that Dynamo compiled since the last reset."""
    return counters["stats"]["unique_graphs"], counters["frames"]["ok"]


@pytest.fixture(autouse=True)
def fresh_counters() -> Iterator[None]:
    counters.clear()
    yield
    counters.clear()


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "all is recomputed": {"use_reentrant": False},
    "products are kept": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, keep_products),
    },
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    """A residual block, as they are compiled one by one."""

    def __init__(self, width: int = 32, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.up = nn.Linear(width, 2 * width, dtype=dtype)
        self.down = nn.Linear(2 * width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, depth: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(dtype=dtype) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Broken(Blocks):
    """Two graphs with Python between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        print(end="")
        torch._dynamo.graph_break()
        return self.blocks[1:](x)


class TestEntry:
    def test_the_backend_is_found_without_an_import(self) -> None:
        script = """
import sys, torch
model = torch.nn.Linear(32, 32)
y = torch.compile(model, backend="poetx", options={"inner": "aot_eager"})(torch.randn(4, 32))
y.sum().backward()
assert model.weight.grad.ndim == 1, "not converted"
assert "poetx" in torch.compiler.list_backends()
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

    def test_importing_it_neither_prints_nor_touches_a_device(self) -> None:
        script = "import poetx_compile, torch; assert not torch.cuda.is_initialized()"
        done = subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
        assert (done.stdout, done.stderr) == (b"", b"")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"blocksize": 64}, "unknown option 'blocksize'; did you mean 'block_size'"),
            ({"max_autotun": True}, "did you mean 'max_autotune'"),
            ({"block_size": 100}, "block_size 100 is impossible"),
        ],
    )
    def test_a_wrong_option_is_told_before_any_weight_is_converted(self, option: dict[str, Any], message: str) -> None:
        model = Block()
        with pytest.raises(Exception, match=message):
            torch.compile(model, backend="poetx", options=option)(torch.randn(4, 32, dtype=torch.float64))
        assert not any(factors.of_weight(weight) for weight in model.parameters())


class TestOutputs:
    """Conversion changes no output."""

    @pytest.mark.parametrize("spelling", CANONICAL + CHECKPOINTED + TRAINABLE, ids=str)
    def test_bit_for_bit(self, spelling: Spelling) -> None:
        layer, x = spelling.layer(), torch.randn(5, INPUTS, dtype=torch.float64)
        expected = layer(x)
        compiled = rotating(layer)
        assert torch.equal(compiled(x), expected)
        assert factors.of_weight(layer.weight)

    @pytest.mark.parametrize("stack", STACKS + CONVOLUTIONS, ids=str)
    def test_bit_for_bit_with_stacks(self, stack: Stack) -> None:
        layer, x = stack.layer(), torch.randn(stack.x, dtype=torch.float64)
        assert torch.equal(rotating(layer, include_conv=True)(x), layer(x))
        assert factor_of(layer.weight).stack.shape == stack.matrices

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (0, 32)], ids=str)
    def test_for_every_dtype_and_batch_shape(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        model, x = Blocks(2, dtype), torch.randn(shape, dtype=dtype)
        y = rotating(model)(x)
        assert torch.equal(y, model(x))
        assert y.dtype == dtype

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_without_gradients_nothing_is_converted(self, mode: Callable[[], AbstractContextManager[None]]) -> None:
        model, x = Blocks(1), torch.randn(4, 32, dtype=torch.float64)
        compiled = rotating(model)
        with mode():
            assert torch.equal(compiled(x), model(x))
        assert not any(factors.of_weight(weight) for weight in model.parameters())
        assert torch.equal(compiled(x), model(x))
        assert factors.of_weight(model.blocks[0].up.weight)

    def test_switching_between_training_and_evaluation(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 32)).double()
        compiled, optimizer, x = rotating(model), torch.optim.SGD(model.parameters(), 0.1), torch.randn(8, 32).double()
        for _ in range(3):
            model.train()
            square(compiled(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                assert torch.equal(compiled(x), model(x))
            assert torch.equal(compiled(x), model(x))

    def test_through_inductor(self) -> None:
        model, x = Blocks(1, torch.bfloat16), torch.randn(4, 32, dtype=torch.bfloat16)
        torch.testing.assert_close(torch.compile(model, backend="poetx", options={"block_size": 16})(x), model(x))


class TestGradients:
    """``W.grad`` is the gradient of the rotation; every other gradient is as it was."""

    @pytest.mark.parametrize("route", ["gram", "dense"])
    @pytest.mark.parametrize("spelling", CANONICAL + CHECKPOINTED, ids=str)
    def test_of_canonical_products(self, spelling: Spelling, route: str) -> None:
        layer, x = spelling.layer(), torch.randn(5, INPUTS, dtype=torch.float64, requires_grad=True)
        square(rotating(layer, route=route)(x)).backward()
        assert factor_of(layer.weight).route == route
        check_against_oracle(layer, x)
        check_against_eager(layer, x)

    @pytest.mark.parametrize("storage", ["folded", "bf16-lean"])
    @pytest.mark.parametrize("overwrite", [lambda y: y.mul_(2), lambda y: y.data.zero_()], ids=["in place", "by data"])
    def test_of_a_result_that_is_overwritten_afterwards(self, storage: str, overwrite: Callable[[Tensor], Tensor]) -> None:
        layer, x = nn.Linear(64, 64, dtype=torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)
        for module in (rotating(layer, storage=storage), layer):
            grads = []
            for change in (lambda y: None, overwrite):
                layer.zero_grad()
                y = module(x)
                total = y.float().sum()
                change(y)
                total.backward()
                assert layer.weight.grad is not None
                grads.append(layer.weight.grad)
            assert torch.equal(*grads)

    @pytest.mark.parametrize("spelling", TRAINABLE, ids=str)
    def test_of_other_products(self, spelling: Spelling) -> None:
        layer, x = spelling.layer(), torch.randn(5, INPUTS, dtype=torch.float64, requires_grad=True)
        square(rotating(layer, route="gram")(x)).backward()
        assert factor_of(layer.weight).route == "dense"
        check_against_oracle(layer, x)
        check_against_eager(layer, x)

    @pytest.mark.parametrize("stack", STACKS + CONVOLUTIONS, ids=str)
    def test_of_stacks(self, stack: Stack) -> None:
        layer, x = stack.layer(), torch.randn(stack.x, dtype=torch.float64, requires_grad=True)
        square(rotating(layer, route="gram", include_conv=True)(x)).backward()
        assert factor_of(layer.weight).route == "dense"
        check_against_oracle(layer, x)
        check_against_eager(layer, x)

    @pytest.mark.parametrize(
        ("model", "shape"),
        [
            (Blocks(2), (4, 32)),
            (Attention(), (2, 5, 48)),
            (nn.TransformerEncoderLayer(48, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64), (2, 5, 48)),
            (nn.TransformerEncoderLayer(48, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64).eval(), (2, 5, 48)),
            (nn.utils.parametrizations.weight_norm(nn.Linear(40, 48, dtype=torch.float64)), (3, 40)),
            (nn.utils.parametrizations.spectral_norm(nn.Linear(40, 48, dtype=torch.float64)).eval(), (3, 40)),
            (nn.LSTMCell(40, 48, dtype=torch.float64), (3, 40)),
            (nn.Sequential(Conv1D(48, 40), nn.Tanh(), Conv1D(17, 48)).double(), (2, 3, 40)),
            (nn.Linear(8, 40, dtype=torch.float64), (3, 8)),
            (nn.Linear(40, 8, dtype=torch.float64), (3, 40)),
        ],
        ids=[
            *(
                "residual blocks",
                "attention",
                "encoder layer",
                "encoder layer in evaluation",
                "weight norm",
                "spectral norm",
            ),
            *("recurrent cell", "Conv1D", "only rows rotate", "only columns rotate"),
        ],
    )
    def test_of_modules(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        model, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64, requires_grad=True)
        square(rotating(model)(x)).backward()
        check_against_oracle(model, x)
        check_against_eager(model, x)

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_of_dynamic_shapes_in_one_graph(self, batch: int) -> None:
        model, x = Blocks(1), torch.randn(batch, 32, dtype=torch.float64, requires_grad=True)
        square(torch.compile(model, backend="poetx", options=OPTIONS, fullgraph=True, dynamic=True)(x)).backward()
        check_against_oracle(model, x)
        check_against_eager(model, x)

    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_of_checkpointed_blocks(self, kind: str) -> None:
        class Checkpointed(Blocks):
            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = checkpoint(block, x, **CHECKPOINTS[kind])
                return x

        model, x = Checkpointed(2), torch.randn(4, 32, dtype=torch.float64)
        square(rotating(model)(x)).backward()
        assert {factor_of(block.up.weight).route for block in model.blocks} == {"gram"}
        check_against_oracle(model, x)

    @pytest.mark.parametrize("is_checkpointed", [False, True])
    def test_checkpoints_save_no_more_activations_than_before(self, is_checkpointed: bool) -> None:
        """Elsewhere the Gram route saves the output of each layer too."""

        class Checkpointed(Blocks):
            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=False) if is_checkpointed else block(x)
                return x

        def saved(compile: Callable[[nn.Module], Any]) -> int:
            numbers: list[int] = []

            def pack(tensor: Tensor) -> Tensor:
                numbers.append(tensor.numel() * (100 in tensor.shape))
                return tensor

            torch._dynamo.reset()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                compile(Checkpointed(2))(torch.randn(100, 32, dtype=torch.float64))
            return sum(numbers)

        assert (saved(partial(rotating, route="gram")) > saved(plain)) is not is_checkpointed

    def test_of_a_part_that_does_not_learn(self) -> None:
        """Under ``no_grad``, or after ``detach``, a weight gets no gradient, though it is converted."""

        class Teacher(Block):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    target = self.up(x)
                return self.up(x) * target + self.up(x).detach()

        model, x = Teacher(), torch.randn(4, 32, dtype=torch.float64)
        compiled = rotating(model)
        square(compiled(x)).backward()
        weight = model.up.weight.detach().clone().requires_grad_()
        target = F.linear(x, weight, model.up.bias).detach()
        (dense,) = torch.autograd.grad(square(F.linear(x, weight, model.up.bias) * target + target), weight)
        torch.testing.assert_close(model.up.weight.grad, factor_of(model.up.weight).project(dense), rtol=1e-10, atol=1e-12)

    def test_add_up_over_micro_batches(self) -> None:
        model, x = Blocks(1), torch.randn(8, 32, dtype=torch.float64)
        compiled = rotating(model)
        square(compiled(x)).backward()
        whole = gradients(model)
        model.zero_grad()
        for part in x.chunk(4):
            (square(compiled(part)) / 4).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-11, atol=1e-14)

    def test_of_a_compiled_function_that_calls_the_model_and_its_loss(self) -> None:
        model, x = Blocks(1), torch.randn(8, 32, dtype=torch.float64)
        rotating(lambda x: square(model(x)))(x).backward()
        check_against_oracle(model, x)

    def test_of_functional_code(self) -> None:
        """Parameters that come as arguments, and a module that is called with them."""
        model, x = Blocks(1), torch.randn(8, 32, dtype=torch.float64)
        parameters = dict(model.named_parameters())
        step = rotating(lambda parameters, x: square(torch.func.functional_call(model, parameters, (x,))))
        step(parameters, x).backward()
        check_against_oracle(model, x)

    def test_of_weights_in_any_memory_order(self) -> None:
        layer, x = nn.Linear(40, 48, dtype=torch.float64), torch.randn(4, 40, dtype=torch.float64)
        layer.weight = nn.Parameter(torch.randn(40, 48, dtype=torch.float64).t())
        compiled, optimizer = rotating(layer), torch.optim.SGD(layer.parameters(), 0.01)
        square(compiled(x)).backward()
        check_against_oracle(layer, x)
        before = torch.linalg.svdvals(layer.weight)
        optimizer.step()
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight), before, rtol=1e-12, atol=0)
        assert layer.weight.stride() == (1, 48)

    def test_through_inductor(self) -> None:
        model, x = Blocks(1), torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
        square(torch.compile(model, backend="poetx", options={"block_size": 16}, fullgraph=True, dynamic=True)(x)).backward()
        check_against_oracle(model, x)
        check_against_eager(model, x)


@dataclass(frozen=True)
class Layer:
    """One step of a random network; ``shares`` is how far back the layer stands whose weight it uses again."""

    spelling: Spelling
    outputs: int
    activation: Callable[[Tensor], Tensor]
    residual: bool
    shares: int


class Network(nn.Module):
    """A stack of layers, each written in its own way, some with the weight of an earlier one."""

    def __init__(self, inputs: int, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.parts = nn.ModuleList()
        for index, layer in enumerate(layers):
            part = layer.spelling.layer(inputs, layer.outputs)
            earlier = self.parts[index - layer.shares] if 0 < layer.shares <= index else None
            if earlier is not None and earlier.weight.shape == part.weight.shape:
                part.weight = earlier.weight
            self.parts.append(part)
            inputs = layer.outputs

    def forward(self, x: Tensor) -> Tensor:
        for layer, part in zip(self.layers, self.parts):
            y = layer.activation(part(x))
            x = x + y if layer.residual and x.shape == y.shape else y
        return x


SIZES = st.sampled_from([16, 17, 33, 40, 48])
LAYERS = st.builds(
    Layer,
    spelling=st.sampled_from(
        [spelling for spelling in CANONICAL + CHECKPOINTED + TRAINABLE if spelling.name != "under grad"]
    ),
    outputs=SIZES,
    activation=st.sampled_from([torch.tanh, F.silu, F.gelu, torch.cos]),
    residual=st.booleans(),
    shares=st.integers(0, 2),
)


@settings(max_examples=15)
@given(inputs=SIZES, layers=st.lists(LAYERS, min_size=1, max_size=4), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_network_trains_as_its_dense_gradient_says(inputs: int, layers: list[Layer], tokens: int, seed: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model, x = Network(inputs, layers), torch.randn(tokens, inputs, dtype=torch.float64)
    y = plain(model)(x)
    square(y).backward()
    ordinary = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    rotated = rotating(model)(x)
    assert torch.equal(rotated, y)
    square(rotated).backward()
    for name, gradient in gradients(model).items():
        factor = factors.of_weight(dict(model.named_parameters())[name])
        assert (factor is None) == name.endswith("bias")
        expected = ordinary[name] if factor is None else factor.project(ordinary[name])
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12 * max(1, expected.abs().max().item()))


class TestSettingsOfTorchCompile:
    def test_mode(self) -> None:
        model, x = nn.Linear(32, 32), torch.randn(4, 32)
        compiled = torch.compile(model, backend="poetx", mode="max-autotune-no-cudagraphs")
        torch.testing.assert_close(compiled(x), model(x))
        assert factors.of_weight(model.weight)

    def test_options_of_inductor_reach_inductor(self) -> None:
        seen: list[torch.fx.Graph] = []
        model, x = nn.Linear(32, 32), torch.randn(4, 32)
        options = {"block_size": 16, "joint_custom_pre_pass": seen.append, "epilogue_fusion": False}
        torch.compile(model, backend="poetx", options=options)(x)
        assert len(seen) == 1

    def test_fullgraph_refuses_what_it_always_refused(self) -> None:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(Broken(2), backend="poetx", options=OPTIONS, fullgraph=True)(torch.randn(4, 32).double())


class TestCompilations:
    """No more graphs and no more frames than plain ``torch.compile`` makes."""

    @staticmethod
    def train(compiled: Any, model: nn.Module, batches: list[int]) -> list[tuple[int, int]]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        counts = []
        for batch in batches:
            model.train()
            square(compiled(torch.randn(batch, 32, dtype=torch.float64))).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                compiled(torch.randn(batch, 32, dtype=torch.float64))
            counts.append(compilations())
        return counts

    @pytest.mark.parametrize(
        ("make", "dynamic"),
        [(Blocks, None), (Blocks, True), (Blocks, False), (Broken, None)],
        ids=["auto", "dynamic", "static", "broken"],
    )
    @pytest.mark.parametrize("batches", [[4] * 5, [4, 5, 1, 6]], ids=["one batch size", "many batch sizes"])
    def test_as_many_as_before(self, make: Callable[[int], nn.Module], dynamic: bool | None, batches: list[int]) -> None:
        model = make(2)
        expected = self.train(plain(model, dynamic=dynamic), model, batches)
        torch._dynamo.reset()
        counters.clear()
        model = make(2)
        compiled = torch.compile(model, backend="poetx", options=OPTIONS, dynamic=dynamic)
        assert self.train(compiled, model, batches) == expected

    def test_one_for_twelve_equal_blocks(self) -> None:
        x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)

        def train(model: Blocks) -> tuple[int, int]:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                square(model(x)).backward()
                optimizer.step()
            optimizer.zero_grad()
            square(model(x)).backward()
            return compilations()

        model = Blocks(12)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        expected = train(model)
        torch._dynamo.reset()
        counters.clear()
        model = Blocks(12)
        for block in model.blocks:
            block.compile(backend="poetx", options=OPTIONS)
        assert train(model) == expected == (1, 1)
        converted = [weight for weight in model.parameters() if factors.of_weight(weight)]
        assert len(converted) == len({id(factor_of(weight)) for weight in converted}) == 24
        check_against_oracle(model, x)

    def test_the_report_says_of_all_blocks_what_it_says_of_the_first(self) -> None:
        model, x = Blocks(3), torch.randn(4, 32, dtype=torch.float64)
        for block in model.blocks:
            block.compile(backend="poetx", options=OPTIONS | {"route": "gram"})
        square(model(x)).backward()
        rows = poetx_compile.report(model, show=False).rows
        assert all(row.how.startswith("rotation: gram") for row in rows if row.converted)
        assert {row.how for row in rows if not row.converted} == {"ordinary: not a matrix"}

    def test_one_for_two_instances_of_a_class(self) -> None:
        models, x = [Blocks(1), Blocks(1)], torch.randn(4, 32, dtype=torch.float64)
        for model in models:
            square(plain(model)(x)).backward()
        expected = compilations()
        torch._dynamo.reset()
        counters.clear()
        for model in models:
            model.zero_grad()
            square(rotating(model)(x)).backward()
            check_against_oracle(model, x)
        assert compilations() == expected

    def test_one_for_two_convolutions(self) -> None:
        """The second kernel meets code that was compiled for the first, and is read as the same matrix."""
        stack = CONVOLUTIONS[1]
        layers, x = [stack.layer() for _ in range(2)], torch.randn(stack.x, dtype=torch.float64)
        for layer in layers:
            square(rotating(layer, include_conv=True)(x)).backward()
            check_against_oracle(layer, x)
            assert factor_of(layer.weight).stack.shape == stack.matrices
        assert compilations() == (1, 1)


class TestPrecision:
    @pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
    @pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
    @pytest.mark.parametrize("route", ["gram", "dense"])
    def test_autocast(self, inside: bool, route: str, is_checkpointed: bool) -> None:
        """Around the compiled region or within it: dtypes and gradients are those of plain compilation."""

        class Casting(Blocks):
            def forward(self, x: Tensor) -> Tensor:
                forward = super().forward
                with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                    return checkpoint(forward, x, use_reentrant=False) if is_checkpointed else forward(x)

        model, x = Casting(1, torch.float32), torch.randn(64, 32)

        def run(compiled: Model) -> Tensor:
            model.zero_grad()
            with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
                y = compiled(x)
            y.float().sub(1).square().mean().backward()
            return y

        expected = run(plain(model))
        ordinary = gradients(model)
        torch._dynamo.reset()
        y = run(rotating(model, route=route))
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        for name, gradient in gradients(model).items():
            assert gradient.dtype == torch.float32
            factor = factors.of_weight(dict(model.named_parameters())[name])
            if factor is None:
                assert torch.equal(gradient, ordinary[name])
            else:
                projected = factor.project(ordinary[name])
                assert (gradient - projected).norm() < 2**-7 * projected.norm()

    def test_autocast_through_inductor(self) -> None:
        model, x = Blocks(1, torch.float32), torch.randn(16, 32)
        compiled = torch.compile(model, backend="poetx", options={"block_size": 16})
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
        square(y.float()).backward()
        expected = rotation_gradients(model, lambda call: square(call(x)))
        for name, gradient in expected.items():
            held = dict(model.named_parameters())[name].grad
            assert held.dtype == torch.float32
            assert (held - gradient).norm() < 0.02 * gradient.norm()

    @pytest.mark.parametrize(
        ("dtype", "residual"),
        [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.float64, False)],
    )
    def test_half_precision_weights_keep_a_residual(self, dtype: torch.dtype, residual: bool) -> None:
        layer, x = nn.Linear(48, 32, dtype=dtype), torch.randn(64, 48, dtype=dtype)
        square(rotating(layer)(x)).backward()
        factor = factor_of(layer.weight)
        assert (factor.residual is not None) is residual
        assert factor.q.dtype == factor.q.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = copy.deepcopy(layer).double()
        square(exact(x.double())).backward()
        expected = factor.project(exact.weight.grad.to(factor.q.dtype))
        assert (factor.q.grad - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


class TestParameters:
    """What users do to parameters behind the compiler's back."""

    def test_a_replaced_parameter_is_converted_in_turn(self) -> None:
        layer, x = nn.Linear(32, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
        compiled = rotating(layer)
        square(compiled(x)).backward()
        layer.weight = nn.Parameter(torch.randn(32, 32, dtype=torch.float64))
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        optimizer.zero_grad()
        assert torch.equal(compiled(x), layer(x))
        square(compiled(x)).backward()
        check_against_oracle(layer, x)
        before = torch.linalg.svdvals(layer.weight)
        optimizer.step()
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight), before, rtol=1e-12, atol=0)
        assert torch.equal(compiled(x), layer(x))

    def test_freezing_and_thawing(self) -> None:
        model, x = Blocks(1), torch.randn(4, 32, dtype=torch.float64)
        compiled, optimizer = rotating(model), torch.optim.AdamW(model.parameters(), 1e-2)
        weight = model.blocks[0].up.weight
        for frozen in (False, True, False, True):
            weight.requires_grad_(not frozen)
            before = weight.detach().clone()
            optimizer.zero_grad()
            square(compiled(x)).backward()
            assert (weight.grad is None) is frozen
            optimizer.step()
            assert torch.equal(weight, before) is frozen
            assert torch.equal(compiled(x), model(x))

    def test_a_weight_that_starts_frozen(self) -> None:
        layer, x = nn.Linear(32, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
        layer.weight.requires_grad_(False)
        compiled = rotating(layer)
        square(compiled(x)).backward()
        assert factors.of_weight(layer.weight) is None
        layer.weight.requires_grad_()
        square(compiled(x)).backward()
        check_against_oracle(layer, x)

    def test_values_written_in_place_count_at_once(self) -> None:
        layer, x = nn.Linear(32, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
        compiled = rotating(layer)
        square(compiled(x)).backward()
        for write in (lambda: layer.weight.data.mul_(2), lambda: nn.init.orthogonal_(layer.weight)):
            write()
            layer.zero_grad()
            square(compiled(x)).backward()
            check_against_oracle(layer, x)


def trained(dtype: torch.dtype) -> tuple[Blocks, Model, Tensor]:
    """A model that has left its start, its compiled form and an input."""
    model, x = Blocks(2, dtype), torch.randn(8, 32, dtype=dtype)
    start = copy.deepcopy(model)
    compiled, optimizer = rotating(model), torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for _ in range(5):
        square(compiled(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(old, new) for old, new in zip(start.parameters(), model.parameters()))
    return model, compiled, x


class TestAgreement:
    """After training, the model is what its raw forward, its state_dict and its copies say."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_raw_forward_state_dict_and_copy(self, dtype: torch.dtype) -> None:
        model, compiled, x = trained(dtype)
        fresh = Blocks(2, dtype)
        assert fresh.state_dict().keys() == model.state_dict().keys()
        fresh.load_state_dict(model.state_dict())
        for other in (model, fresh, copy.deepcopy(model), copy.deepcopy(compiled)):
            assert torch.equal(other(x), compiled(x))

    def test_whole_modules_saved_and_loaded(self, tmp_path: Path) -> None:
        model, compiled, x = trained(torch.float32)
        for module in (model, compiled):
            torch.save(module, tmp_path / "model.pt")
            loaded = torch.load(tmp_path / "model.pt", weights_only=False)
            assert torch.equal(loaded(x), compiled(x))
            assert all(type(parameter) is nn.Parameter for parameter in loaded.parameters())


@pytest.mark.parametrize("copied", ["model", "compiled"])
def test_copies_train_on_their_own(copied: str) -> None:
    model, compiled, x = trained(torch.float64)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if copied == "model":
        twin = copy.deepcopy(model)
        twin_compiled = rotating(twin)
    else:
        twin_compiled = copy.deepcopy(compiled)
        twin = twin_compiled._orig_mod

    def train(module: nn.Module, call: Model) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            square(call(x)).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(twin, twin_compiled)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    train(model, compiled)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    for one, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:poetx. new permutations")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
def test_a_thousand_steps_keep_the_singular_values(dtype: torch.dtype, tolerance: float) -> None:
    """To a share of the largest: rounding errs alike in all directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 17)).to(dtype)
    weights = [model[0].weight, model[2].weight]
    before = [torch.linalg.svdvals(exact_weight(weight)) for weight in weights]
    start = [weight.detach().clone() for weight in weights]
    compiled = rotating(model, permutation_period=100)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(1000):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
        (compiled(x) - x[:, :17].sin()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight, singular, old in zip(weights, before, start):
        assert (weight - old).norm() > 0.3 * old.norm()
        now = torch.linalg.svdvals(exact_weight(weight))
        torch.testing.assert_close(now, singular, rtol=0, atol=tolerance * float(singular.max()))


def exact_weight(weight: nn.Parameter) -> Tensor:
    """A weight with its residual, if it has one by now, in float64."""
    from poetx_compile.kernels import decode

    factor = factors.of_weight(weight)
    return decode(weight.detach(), None if factor is None else factor.residual).double()


class TestDistributed:
    @pytest.fixture(autouse=True)
    def process_group(self, tmp_path: Path) -> Iterator[None]:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("order", ["wrapped, then compiled", "compiled, then wrapped"])
    def test_ddp_is_refused_in_one_sentence(self, order: str) -> None:
        model, wrap = Blocks(1), nn.parallel.DistributedDataParallel
        module = rotating(wrap(model)) if order.startswith("wrapped") else wrap(rotating(model))
        with pytest.raises(
            Exception, match=r"Add the line  poetx_compile.prepare\(model, batch\)  before DistributedDataParallel"
        ):
            module(torch.randn(4, 32, dtype=torch.float64))
        assert not any(factors.of_weight(weight) for weight in model.parameters())

    def test_a_process_group_alone_does_not_matter(self) -> None:
        model, x = Blocks(1), torch.randn(4, 32, dtype=torch.float64)
        square(rotating(model)(x)).backward()
        check_against_oracle(model, x)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SkewMuon])
def test_new_permutations_and_a_resume_do_not_depend_on_the_default_device(kind: type[torch.optim.Optimizer]) -> None:
    ends = []
    for device in ("cpu", "meta"):
        torch._dynamo.reset()
        model, resumed = network(), network()
        optimizer, restarted = kind(model.parameters(), lr=0.01), kind(resumed.parameters(), lr=0.01)
        batches = [
            torch.randn(8, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) for step in range(4)
        ]
        try:
            torch.set_default_device(device)
            for of, trainer, steps in ((model, optimizer, batches[:2]), (resumed, restarted, batches[2:])):
                if of is resumed:
                    resumed.load_state_dict(model.state_dict())
                    restarted.load_state_dict(optimizer.state_dict())
                compiled = rotating(of, permutation_period=1, chunk=4)
                for x in steps:
                    square(compiled(x)).backward()
                    trainer.step()
                    trainer.zero_grad()
        finally:
            torch.set_default_device(None)
        ends.append(values(resumed))
    assert all(map(torch.equal, *ends))
