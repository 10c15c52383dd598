"""The parameter that a user holds while its weight is stored lean: what reads it, what writes it, what copies and moves it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import normal
from torch import Tensor, nn, optim

from poetx_compile import PoetxConfig, PoetxError, conversion, restore, stand_in
from poetx_compile.base import BASES
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.registry import factors
from poetx_compile.retraction import retract_all
from poetx_compile.stand_in import StandIn, values

CONFIG = PoetxConfig(block_size=16, chunk=4)
of_storages = pytest.mark.parametrize("storage", BASES)


def packed(
    storage: str = "int8", dtype: torch.dtype = torch.bfloat16, bias: bool = True
) -> tuple[nn.Linear, OrthogonalFactor]:
    """A layer with left-over channels whose weight is stored lean, and has turned twice."""
    layer = nn.Linear(50, 32, bias=bias, dtype=dtype)
    factor = conversion.adopt(layer.weight, "weight", CONFIG, storage=storage)
    factor.is_covered = True  # no optimizer steps it in these tests, and that is meant
    stand_in.pack([factor])
    for step in range(2):
        turn(factor, step)
    return layer, factor


def turn(factor: OrthogonalFactor, seed: int) -> None:
    with torch.no_grad():
        factor.q.copy_(normal(factor.q.numel(), seed=seed, dtype=factor.q.dtype) * 0.1)
    retract_all([(factor, 1.0)])
    factor.count_step()


@pytest.fixture(params=BASES)
def layer(request: pytest.FixtureRequest) -> Iterator[nn.Linear]:
    yield packed(request.param)[0]


def dense(layer: nn.Linear) -> Tensor:
    return values(layer.weight)


# --- What it is ------------------------------------------------------------------------------------------------------


def test_it_is_the_same_parameter_without_memory(layer: nn.Linear) -> None:
    ordinary = nn.Linear(50, 32, dtype=torch.bfloat16)
    held = weakref.ref(ordinary.weight)
    group = [ordinary.weight]
    stand_in.pack([conversion.adopt(ordinary.weight, "weight", CONFIG, storage="int8")])
    assert held() is ordinary.weight is group[0]
    assert isinstance(ordinary.weight, nn.Parameter)
    assert type(ordinary.weight) is StandIn
    assert ordinary.weight.untyped_storage().nbytes() == 2
    assert (ordinary.weight.shape, ordinary.weight.dtype) == ((32, 50), torch.bfloat16)
    assert (ordinary.weight.device.type, ordinary.weight.numel(), ordinary.weight.ndim) == ("cpu", 1600, 2)
    assert ordinary.weight.is_leaf
    assert ordinary.weight.requires_grad


@of_storages
def test_packing_moves_no_number_by_more_than_storage_rounds(storage: str) -> None:
    weight = nn.Parameter(normal(32, 300, seed=0, dtype=torch.bfloat16))
    before = weight.detach().clone()
    factor = conversion.adopt(weight, "weight", CONFIG, storage=storage)
    stand_in.pack([factor])
    exact = factor.made(torch.float32).weight()
    assert (exact - before).abs().max().item() <= (before.abs().max().item() / 127 * 0.51 if storage == "int8" else 0)
    assert storage != "int8" or (weight != before).any()


def test_a_weight_that_int8_cannot_keep_stays_as_it_was() -> None:
    for bad in (float("nan"), float("inf"), 3e38):
        weight = nn.Parameter(normal(32, 50, seed=0, dtype=torch.bfloat16))
        with torch.no_grad():
            weight[3, 4] = bad
        factor = conversion.adopt(weight, "fc.weight", CONFIG, storage="int8")
        with pytest.raises(PoetxError, match=r"'fc.weight' holds NaN, infinite or very large numbers"):
            stand_in.pack([factor])
        assert type(weight) is nn.Parameter
        assert weight[0].isfinite().all()


def test_it_goes_with_its_model() -> None:
    gc.collect()
    held = len(factors)
    layer, factor = packed()
    stored = weakref.ref(factor.base.stored)
    assert len(factors) == held + 1
    del layer, factor
    gc.collect()
    assert len(factors) == held
    assert stored() is None


# --- Reading ---------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda w: w.norm(),
    "sum": torch.sum,
    "add": lambda w: w + 1,
    "radd": lambda w: 1 + w,
    "left of a product": lambda w: w @ torch.ones(50, 3, dtype=w.dtype),
    "right of a product": lambda w: torch.ones(3, 32, dtype=w.dtype) @ w,
    "linear": lambda w: F.linear(torch.ones(3, 50, dtype=w.dtype), w),
    "with itself": lambda w: F.linear(w, w),
    "transpose": lambda w: w.T,
    "index": lambda w: w[3:5, ::2],
    "unbind": lambda w: w.unbind(0)[7],
    "concatenate": lambda w: torch.cat([w, w]),
    "foreach": lambda w: torch._foreach_mul([w, w], 2.0)[1],
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data + 0,
    "cast": lambda w: w.float(),
    "numpy": lambda w: torch.from_numpy(w.detach().float().numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "iterate": lambda w: torch.stack(list(w)),
    "singular values": lambda w: torch.linalg.svdvals(w.float()),
    "any": lambda w: (w > 0).any(),
    "parameters_to_vector": lambda w: nn.utils.parameters_to_vector([w]),
    "functional_call": lambda w: torch.func.functional_call(
        nn.Linear(50, 32, bias=False, dtype=w.dtype), {"weight": w}, torch.ones(2, 50, dtype=w.dtype)
    ),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_whoever_reads_it_reads_the_weight(layer: nn.Linear, read: Callable[[Any], Any]) -> None:
    ordinary = nn.Parameter(dense(layer))
    wanted, got = read(ordinary), read(layer.weight)
    assert not isinstance(got, StandIn)
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=0, atol=0)
    assert got.requires_grad == wanted.requires_grad


def test_it_prints_its_values(layer: nn.Linear) -> None:
    assert "nan" not in repr(layer.weight)
    assert "nan" not in str(layer.weight.data)


def test_reading_without_gradients_makes_no_graph(layer: nn.Linear) -> None:
    with torch.no_grad():
        assert not (layer.weight * 2).requires_grad
    assert not layer.weight.detach().requires_grad
    layer.weight.requires_grad_(False)
    assert not (layer.weight * 2).requires_grad


def test_facts_are_read_without_making_the_weight(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(weight: Any) -> Tensor:
        raise AssertionError("a fact about the weight does not need its values")

    monkeypatch.setattr(stand_in, "values", never)
    monkeypatch.setattr(stand_in, "_differentiable", never)
    w = layer.weight
    assert w.shape == w.size() == (32, 50)
    facts = (w.dtype, w.device, w.ndim, w.dim(), w.numel(), w.element_size(), w.nbytes, w.layout, w.is_leaf, w.requires_grad)
    assert len(w) == 32
    facts += (w.grad, w.grad_fn, w.is_cuda, w.is_sparse, w.is_floating_point(), w._version, hash(w))
    assert facts[:4] == (torch.bfloat16, torch.device("cpu"), 2, 2)
    for like in (torch.zeros_like(w), torch.empty_like(w), w.new_zeros(3), torch.rand_like(w)):
        assert type(like) is Tensor


@of_storages
@pytest.mark.parametrize("use", ["linear", "matmul", "addmm", "norm", "transposed", "autograd.Function"])
def test_gradients_reach_the_rotation(storage: str, use: str) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w * w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "linear": lambda w, x: F.linear(x, w, x[:32, 0]),
        "matmul": lambda w, x: x[:, :32] @ w,
        "addmm": lambda w, x: torch.addmm(x[0, :50], x[:, :32], w),
        "norm": lambda w, x: (w * x[:32, :50]).norm(dim=0),
        "transposed": lambda w, x: x @ w.t(),
        "autograd.Function": lambda w, x: Double.apply(w.clone()) @ x.t(),
    }
    layer, factor = packed(storage, torch.float64)
    x = normal(40, 50, seed=5).requires_grad_()
    probe = normal(100, 100, seed=6)

    def objective(w: Any) -> Tensor:
        y = uses[use](w, x)
        return (y * probe[: y.shape[0], : y.shape[-1]] if y.ndim == 2 else y * probe[0, : len(y)]).sum()

    ordinary = nn.Parameter(dense(layer))
    objective(ordinary).backward()
    wanted, wanted_x, x.grad = factor.project(ordinary.grad), x.grad, None
    objective(layer.weight).backward()
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, wanted_x, rtol=1e-10, atol=1e-10)
    assert layer.weight.grad is factor.q.grad


def test_a_linear_layer_keeps_no_weight_for_its_backward_pass(layer: nn.Linear) -> None:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, t.numel())) or t, lambda t: t):
        layer(torch.ones(3, 50, dtype=torch.bfloat16))
    stored = factors.of_weight(layer.weight).base.stored
    assert [size for size in sizes if size[1] >= 1600] == [(stored.dtype, 1600)]


def test_transforms_of_functions_see_the_weight(layer: nn.Linear) -> None:
    x = normal(4, 50, seed=3, dtype=torch.bfloat16)
    each = torch.func.vmap(lambda row: F.linear(row, layer.weight, layer.bias))(x)
    torch.testing.assert_close(each, F.linear(x, dense(layer), layer.bias), rtol=0, atol=0.01)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_takes_it_as_any_weight(enabled: bool) -> None:
    layer, _ = packed("int8", torch.float16)
    ordinary = nn.Linear(50, 32, dtype=torch.float16)
    ordinary.load_state_dict(layer.state_dict())
    x = normal(4, 50, seed=3, dtype=torch.float32 if enabled else torch.float16)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        got, wanted = layer(x), ordinary(x)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# --- Writing ---------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda w: w.copy_(torch.full((32, 50), 0.5)),
    "mul_": lambda w: w.mul_(2),
    "imul": lambda w: w.__imul__(3),
    "setitem": lambda w: w.__setitem__(slice(0, 3), 0.0),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "out": lambda w: torch.add(torch.ones(32, 50, dtype=w.dtype), 1, out=w),
    "normal_": lambda w: nn.init.normal_(w, generator=torch.Generator().manual_seed(3)),
    "zeros_": nn.init.zeros_,
    "orthogonal_": lambda w: w.copy_(torch.eye(32, 50)),
    "data.copy_": lambda w: w.data.copy_(torch.full((32, 50), 0.5)),
    "data.mul_": lambda w: w.data.mul_(2),
    "data.setitem": lambda w: w.data.__setitem__(slice(0, 3), 0.0),
    "piece": lambda w: w[3:5].mul_(2),
    "piece of a piece": lambda w: w.view(-1)[40:80][3].zero_(),
    "transposed": lambda w: w.T.__setitem__(4, 0.25),
    "row": lambda w: next(iter(w)).fill_(0.5),
    "data, piece": lambda w: w.data[3].zero_(),
    "data": lambda w: setattr(w, "data", torch.full((32, 50), 0.5, dtype=w.dtype)),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.arange(1600, dtype=w.dtype) / 1600, [w]),
}


@of_storages
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_is_the_weight(storage: str, write: Callable[[Any], Any]) -> None:
    layer, factor = packed(storage)
    ordinary = nn.Parameter(dense(layer))
    with torch.no_grad():
        write(ordinary)
        version = layer.weight._version
        write(layer.weight)
    assert layer.weight._version > version
    assert type(layer.weight) is StandIn
    assert not factor.base.is_turned
    allowed = ordinary.abs().max().item() * (0.51 / 127 + 2**-8) if storage == "int8" else 0
    assert (dense(layer) - ordinary).abs().max().item() <= allowed


def test_writing_to_it_while_gradients_are_on_is_refused_as_for_any_leaf(layer: nn.Linear) -> None:
    before = dense(layer)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        layer.weight.mul_(2)
    assert torch.equal(dense(layer), before)


@of_storages
@pytest.mark.parametrize(
    "write", [nn.init.ones_, nn.init.normal_, nn.init.kaiming_uniform_], ids=lambda write: write.__name__
)
def test_initialisers_write_to_it_while_gradients_are_on(storage: str, write: Callable[[Any], Any]) -> None:
    layer, _ = packed(storage)
    before = dense(layer)
    torch.manual_seed(5)
    write(layer.weight)
    assert type(layer.weight) is StandIn
    assert layer.weight.requires_grad
    assert not torch.equal(dense(layer), before)


def test_writing_numbers_that_int8_cannot_keep_is_refused() -> None:
    layer, _ = packed("int8")
    before = dense(layer)
    with torch.no_grad(), pytest.raises(PoetxError, match="holds NaN"):
        layer.weight.fill_(float("nan"))
    assert torch.equal(dense(layer), before)


def test_another_shape_is_refused(layer: nn.Linear) -> None:
    with pytest.raises(PoetxError, match=r"'weight' is stored lean and cannot take another shape"):
        layer.weight.data = torch.ones(3, 3)
    assert layer.weight.shape == (32, 50)


# --- Copying, saving, moving -----------------------------------------------------------------------------------------


def test_state_dict_holds_ordinary_tensors(layer: nn.Linear) -> None:
    state = layer.state_dict()
    assert type(state["weight"]) is Tensor
    assert torch.equal(state["weight"], dense(layer))
    ordinary = nn.Linear(50, 32, dtype=torch.bfloat16)
    ordinary.load_state_dict(state)
    x = torch.ones(2, 50, dtype=torch.bfloat16)
    assert torch.equal(ordinary(x), layer(x))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], dense(layer))


def test_what_it_loads_it_is(layer: nn.Linear) -> None:
    other = nn.Linear(50, 32, dtype=torch.bfloat16)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(dense(layer), other.weight.detach(), rtol=0, atol=other.weight.abs().max().item() / 127)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "average": lambda layer: optim.swa_utils.AveragedModel(layer).module,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_ordinary(layer: nn.Linear, copied: Callable[[nn.Module], nn.Module]) -> None:
    twin: Any = copied(layer)
    assert type(twin.weight) is nn.Parameter
    assert twin.weight.requires_grad
    assert torch.equal(twin.weight, dense(layer))
    before = dense(layer)
    nn.init.ones_(twin.weight)
    assert torch.equal(dense(layer), before)


def test_tied_parameters_stay_tied_in_a_copy() -> None:
    layer, _ = packed()
    twin = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert twin[0].weight is twin[1].weight


def test_a_saved_module_loads_without_the_package(layer: nn.Linear) -> None:
    file = io.BytesIO()
    torch.save(layer, file)
    assert b"poetx" not in file.getvalue()
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).weight, dense(layer))


def test_an_average_follows_it(layer: nn.Linear) -> None:
    average = optim.swa_utils.AveragedModel(layer, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.0))
    turn(factors.of_weight(layer.weight), 7)
    average.update_parameters(layer)
    average.update_parameters(layer)
    assert torch.equal(average.module.weight, dense(layer))


@of_storages
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casting_a_model_keeps_its_base_and_its_rotations(storage: str, dtype: torch.dtype) -> None:
    layer, factor = packed(storage)
    kept = {name: tensor.clone() for name, tensor in factor.kept.items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = factor.made(exact).weight().to(dtype)
    layer.to(dtype)
    assert type(layer.weight) is StandIn
    assert layer.weight.dtype == dtype
    assert all(torch.equal(factor.kept[name], tensor) for name, tensor in kept.items())
    assert torch.equal(dense(layer), wanted)
    turn(factor, 3)


def test_restoring_gives_the_weight_back(layer: nn.Linear) -> None:
    before, weight = dense(layer), layer.weight
    layer(torch.ones(2, 50, dtype=torch.bfloat16)).sum().backward()
    assert restore(layer) == ["weight"]
    assert layer.weight is weight
    assert type(weight) is nn.Parameter
    assert torch.equal(weight, before)
    assert factors.of_weight(weight) is None
    layer(torch.ones(2, 50, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad.shape == weight.shape
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(weight, before * 2)


# --- Two of them, and copies from before -----------------------------------------------------------------------------


@of_storages
def test_data_takes_the_values_of_another(storage: str) -> None:
    (one, _), (other, factor) = packed(storage), packed(storage)
    turn(factor, 7)
    expected = dense(other)
    assert not (one.weight.data - other.weight).isnan().any()
    one.weight.data.copy_(other.weight)
    torch.testing.assert_close(dense(one), expected, rtol=0, atol=float(expected.abs().max()) / 127)
    one.weight.data.zero_()
    one.weight.data = other.weight
    torch.testing.assert_close(dense(one), expected, rtol=0, atol=float(expected.abs().max()) / 127)


def test_a_copy_from_before_a_step_is_no_move() -> None:
    layer, factor = packed("bf16-lean")
    with torch.no_grad():
        saved = layer.weight.cpu()
    expected = saved.clone()
    turn(factor, 7)
    layer.weight.data = saved
    assert torch.equal(dense(layer), expected)


def test_its_class_makes_ordinary_parameters(layer: nn.Linear) -> None:
    made = type(layer.weight)(torch.ones(3), requires_grad=False)
    assert type(made) is nn.Parameter
    assert not made.requires_grad


def test_a_compiled_function_reads_its_data(layer: nn.Linear) -> None:
    average = torch.zeros(32, 50, dtype=torch.bfloat16)
    torch.compile(lambda kept, value: kept.lerp_(value, 0.5), backend="eager")(average, layer.weight.data)
    assert torch.equal(average, torch.zeros_like(average).lerp(dense(layer), 0.5))


def test_all_are_looked_at_before_the_first_is_packed() -> None:
    fit, unfit = (nn.Parameter(normal(32, 50, seed=0, dtype=torch.bfloat16)) for _ in range(2))
    with torch.no_grad():
        unfit[0, 0] = float("nan")
    converted = [conversion.adopt(weight, "weight", CONFIG, storage="int8") for weight in (fit, unfit)]
    with pytest.raises(PoetxError, match="holds NaN"):
        stand_in.pack(converted)
    assert type(fit) is nn.Parameter


@pytest.mark.parametrize(
    "product",
    [
        lambda x, layer: F.linear(x, weight=layer.weight),
        lambda x, layer: F.linear(x, layer.weight, bias=layer.bias),
        lambda x, layer: x[:, :32] @ layer.weight,
        lambda x, layer: torch.mm(x[:, :32], layer.weight),
        lambda x, layer: x[:, :32].mm(layer.weight),
        lambda x, layer: x[:, :32].matmul(layer.weight),
    ],
)
def test_an_eager_product_keeps_no_weight(layer: nn.Linear, product: Callable[[Tensor, nn.Linear], Tensor]) -> None:
    kept: list[Tensor] = []
    x = normal(4, 50, seed=1, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        product(x, layer)
    stored = factors.of_weight(layer.weight).base.stored
    weights = [saved for saved in kept if saved.shape == layer.weight.shape]
    assert all(saved.data_ptr() == stored.data_ptr() for saved in weights)
