"""Which parameters become rotations, by which uses, and the typed reason of every other one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import CONFIG, capture, reasons, spelled
from hypothesis import given
from hypothesis import strategies as st
from spellings import CANONICAL, CHECKPOINTED, CONVOLUTIONS, INPUTS, OTHER, OUTPUTS, STACKS, Spelling, Stack
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.config import HEADS
from poetx_compile.passes import SkipReason, match
from poetx_compile.passes.match import is_head, is_named, parameter_name

global_model: Callable[[Tensor], Tensor] = torch.tanh


class Wrapped(nn.Module):
    """A function of its input and of named parameters or modules."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("spelling", CANONICAL + CHECKPOINTED, ids=str)
def test_canonical_uses_are_named(spelling: Spelling) -> None:
    matches, _ = spelled(spelling)[1].normalized().matched()
    assert len(matches["weight"].uses) == spelling.uses


@pytest.mark.parametrize("spelling", OTHER, ids=str)
def test_other_uses_leave_the_dense_route(spelling: Spelling) -> None:
    matches, _ = spelled(spelling)[1].normalized().matched()
    assert matches["weight"].uses == ()


def test_modules() -> None:
    found = reasons(
        nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.LayerNorm(OUTPUTS), nn.Linear(OUTPUTS, 32)), torch.randn(5, INPUTS)
    )
    converted = {name for name, reason in found.items() if reason is None}
    assert converted == {"0.weight", "2.weight"}


def test_multi_head_attention_takes_the_dense_route() -> None:
    attention = nn.MultiheadAttention(OUTPUTS, 4)
    captured = capture(lambda x: attention(x, x, x)[0], torch.randn(5, 2, OUTPUTS))
    matches, _ = captured.normalized().matched()
    assert {name: found.uses for name, found in matches.items()} == {"in_proj_weight": (), "out_proj.weight": ()}


def test_separate_projections_of_attention() -> None:
    attention = nn.MultiheadAttention(OUTPUTS, 4, kdim=32, vdim=64, add_bias_kv=True)
    q, k, v = (torch.randn(5, 2, size) for size in (OUTPUTS, 32, 64))
    matches, _ = capture(lambda q, k, v: attention(q, k, v)[0], q, k, v).normalized().matched()
    assert set(matches) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


def test_the_match_knows_its_parameter() -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    captured = capture(layer, torch.randn(5, INPUTS)).normalized()
    found = captured.matched()[0]["weight"]
    assert found.weight is layer.weight
    assert list(captured.inputs.values())[found.index] is layer.weight
    assert found.placeholder is captured.placeholder(layer.weight)


def test_reading_changes_nothing() -> None:
    captured = capture(nn.Linear(INPUTS, OUTPUTS), torch.randn(5, INPUTS)).normalized()
    code, parameters = captured.gm.code, {node: id(value) for node, value in captured.inputs.items()}
    assert captured.matched() == captured.matched()
    assert (captured.gm.code, {node: id(value) for node, value in captured.inputs.items()}) == (code, parameters)


@pytest.mark.parametrize(
    ("expected", "function", "weight", "x"),
    [
        (SkipReason.NOT_A_LINEAR, lambda m, x: x + m.w, parameter(5, OUTPUTS), torch.randn(5, OUTPUTS)),
        (
            SkipReason.NOT_A_LINEAR,
            lambda m, x: F.linear(x, m.w) + m.w[0, 0],
            parameter(32, OUTPUTS),
            torch.randn(5, OUTPUTS),
        ),
        (
            SkipReason.NOT_A_LINEAR,
            lambda m, x: F.linear(x, F.normalize(m.w)),
            parameter(32, OUTPUTS),
            torch.randn(5, OUTPUTS),
        ),
        (SkipReason.NOT_A_LINEAR, lambda m, x: F.linear(m.w, x), parameter(32, OUTPUTS), torch.randn(5, OUTPUTS)),
        (SkipReason.EMBEDDING, lambda m, x: F.embedding(x, m.w), parameter(32, OUTPUTS), torch.arange(5)),
        (SkipReason.TIED, lambda m, x: F.linear(F.embedding(x, m.w), m.w), parameter(32, OUTPUTS), torch.arange(5)),
        (SkipReason.TOO_SMALL, lambda m, x: F.linear(x, m.w), parameter(15, 8), torch.randn(5, 8)),
        (SkipReason.NOT_A_MATRIX, lambda m, x: x * m.w, parameter(OUTPUTS), torch.randn(5, OUTPUTS)),
        (SkipReason.NOT_A_MATRIX, lambda m, x: F.linear(x, m.w), parameter(1, 32), torch.randn(5, 32)),
        (SkipReason.NOT_A_MATRIX, lambda m, x: x + m.w, parameter(1, 5, 32), torch.randn(2, 5, 32)),
        (SkipReason.NOT_A_LINEAR, lambda m, x: torch.bmm(x, m.w) + m.w.sum(), parameter(2, 32, 32), torch.randn(2, 5, 32)),
        (SkipReason.TOO_SMALL, lambda m, x: torch.bmm(x, m.w), parameter(64, 8, 15), torch.randn(64, 5, 8)),
        (SkipReason.NOT_A_LINEAR, lambda m, x: F.linear(x, 2 / m.w), parameter(32, OUTPUTS), torch.randn(5, OUTPUTS)),
        (SkipReason.NOT_A_LINEAR, lambda m, x: F.linear(x, m.w * x[0]), parameter(32, OUTPUTS), torch.randn(5, OUTPUTS)),
        (
            SkipReason.NOT_A_LINEAR,
            lambda m, x: F.linear(x, torch.div(m.w, 2, rounding_mode="floor")),
            parameter(32, OUTPUTS),
            torch.randn(5, OUTPUTS),
        ),
        (
            SkipReason.NOT_A_LINEAR,
            lambda m, x: F.linear(x, torch.div(m.w, other=x.std(0))),
            parameter(32, OUTPUTS),
            torch.randn(5, OUTPUTS),
        ),
        (SkipReason.EMBEDDING, lambda m, x: m.w[x].cos(), parameter(64, 32), torch.arange(5)),
        (SkipReason.CONVOLUTION, lambda m, x: F.conv2d(x, m.w), parameter(32, 16, 1, 1), torch.randn(2, 16, 4, 4)),
        (SkipReason.GROUPED, lambda m, x: F.conv2d(x, m.w, groups=2), parameter(32, 8, 3, 3), torch.randn(2, 16, 4, 4)),
        (
            SkipReason.GROUPED,
            lambda m, x: F.conv_transpose1d(x, m.w, None, 1, 0, 0, 4),
            parameter(16, 32, 3),
            torch.randn(2, 16, 4),
        ),
        (SkipReason.ZERO, lambda m, x: F.linear(x, m.w), nn.Parameter(torch.zeros(32, 32)), torch.randn(5, 32)),
        (
            SkipReason.FROZEN,
            lambda m, x: F.linear(x, m.w),
            nn.Parameter(torch.randn(32, 32), requires_grad=False),
            torch.randn(5, 32),
        ),
        (SkipReason.DTYPE, lambda m, x: F.linear(x, m.w), parameter(32, 32, dtype=torch.complex64), torch.randn(5, 32) + 0j),
    ],
    ids=lambda value: value.name if isinstance(value, SkipReason) else "",
)
def test_what_stays_ordinary(
    expected: SkipReason, function: Callable[[Any, Tensor], Tensor], weight: nn.Parameter, x: Tensor
) -> None:
    assert reasons(Wrapped(function, w=weight), x) == {"w": expected}


def test_kernels_of_convolutions_where_the_option_says_so() -> None:
    config = PoetxConfig(block_size=16, include_conv=True)
    layer = nn.Conv2d(16, 32, 3)
    matches, _ = capture(layer, torch.randn(2, 16, 4, 4)).normalized().matched(config)
    assert matches["weight"].stack.shape == (1, 32, 144)
    mixed = Wrapped(lambda m, x: F.conv1d(x, m.w).sum() + (x.mT @ m.w.flatten(1).mT), w=parameter(32, 16, 1))
    assert reasons(mixed, torch.randn(2, 16, 4), config=config) == {"w": SkipReason.NOT_A_LINEAR}


@pytest.mark.parametrize("stack", STACKS + CONVOLUTIONS, ids=str)
def test_stacks_know_their_matrices(stack: Stack) -> None:
    config = PoetxConfig(block_size=16, include_conv=True)
    captured = capture(stack.layer(), torch.randn(stack.x, dtype=torch.float64)).normalized()
    found = captured.matched(config)[0]["weight"]
    assert (found.stack.shape, found.uses) == (stack.matrices, ())


def test_one_matrix_of_zeros_keeps_a_stack_ordinary() -> None:
    experts = parameter(3, 32, 48)
    with torch.no_grad():
        experts[1] = 0
    model = Wrapped(lambda m, x: torch.bmm(x, m.w), w=experts)
    assert reasons(model, torch.randn(3, 5, 32)) == {"w": SkipReason.ZERO}


def test_weight_norm_rotates_the_direction() -> None:
    found = reasons(nn.utils.parametrizations.weight_norm(nn.Linear(INPUTS, OUTPUTS)), torch.randn(5, INPUTS))
    magnitude, direction = (f"parametrizations.weight.original{part}" for part in (0, 1))
    assert found == {"bias": SkipReason.NOT_A_MATRIX, magnitude: SkipReason.NOT_A_MATRIX, direction: None}


def test_spectral_norm_rotates_the_leaf() -> None:
    found = reasons(nn.utils.parametrizations.spectral_norm(nn.Linear(INPUTS, OUTPUTS)), torch.randn(5, INPUTS))
    assert found["parametrizations.weight.original"] is None


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_the_old_spectral_norm_leaves_the_leaf_ordinary() -> None:
    found = reasons(nn.utils.spectral_norm(nn.Linear(INPUTS, OUTPUTS)), torch.randn(5, INPUTS))
    assert found["weight_orig"] is SkipReason.NOT_A_LINEAR


def test_an_orthogonal_weight_stays_as_it_is_parametrised() -> None:
    found = reasons(nn.utils.parametrizations.orthogonal(nn.Linear(INPUTS, OUTPUTS)), torch.randn(5, INPUTS))
    assert found["parametrizations.weight.original"] is SkipReason.NOT_A_LINEAR


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(cell: Callable[..., nn.Module]) -> None:
    found = reasons(cell(INPUTS, OUTPUTS), torch.randn(5, INPUTS))
    assert {name for name, reason in found.items() if reason is None} == {"weight_ih", "weight_hh"}


def test_one_rotated_side_is_enough() -> None:
    assert reasons(nn.Linear(8, 16, bias=False), torch.randn(5, 8)) == {"weight": None}


def test_subclasses_of_parameter_are_not_touched() -> None:
    class Special(nn.Parameter):
        pass

    layer = nn.Linear(32, 32, bias=False)
    layer.weight = Special(torch.randn(32, 32))
    assert reasons(layer, torch.randn(5, 32)) == {"weight": SkipReason.DTYPE}


def test_low_rank_update() -> None:
    """``W + A B`` as in DoRA: none of the three is the weight of a linear layer."""
    model = Wrapped(lambda m, x: F.linear(x, m.w + m.a @ m.b), w=parameter(48, 40), a=parameter(48, 16), b=parameter(16, 40))
    found = reasons(model, torch.randn(5, 40))
    assert found == {"w": SkipReason.NOT_A_LINEAR, "a": SkipReason.NO_INPUT, "b": SkipReason.NO_INPUT}


@pytest.mark.parametrize("product", [lambda a, b: a @ b.t(), lambda a, b: torch.mm(a, b.T), lambda a, b: a.matmul(b.mT)])
def test_low_rank_products_stay_ordinary_however_they_are_written(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Wrapped(lambda m, x: x @ product(m.a, m.b), a=parameter(40, 16), b=parameter(48, 16))
    assert set(reasons(model, torch.randn(5, 40)).values()) == {SkipReason.NO_INPUT}


def test_low_rank_layers_that_see_the_input_are_linear_layers() -> None:
    model = Wrapped(lambda m, x: m.b(m.a(x)), a=nn.Linear(40, 16, bias=False), b=nn.Linear(16, 48, bias=False))
    assert reasons(model, torch.randn(5, 40)) == {"a.weight": None, "b.weight": None}


def test_a_linear_layer_of_learned_queries_is_one() -> None:
    model = Wrapped(lambda m, x: m.fc(m.query) @ x.t(), query=parameter(6, 40), fc=nn.Linear(40, 48, bias=False))
    assert reasons(model, torch.randn(5, 48)) == {"query": SkipReason.NOT_A_LINEAR, "fc.weight": None}


class TestHeads:
    @pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score"])
    def test_by_name(self, name: str) -> None:
        model = Wrapped(lambda m, x: getattr(m, name)(m.fc(x)), fc=nn.Linear(32, 32, bias=False))
        setattr(model, name, nn.Linear(32, 16, bias=False))
        assert reasons(model, torch.randn(5, 32)) == {"fc.weight": None, f"{name}.weight": SkipReason.HEAD}

    def test_a_name_that_only_begins_like_a_head_is_none(self) -> None:
        model = Wrapped(lambda m, x: m.header(x), header=nn.Linear(32, 16, bias=False))
        assert reasons(model, torch.randn(5, 32)) == {"header.weight": None}

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.weight",
            "model.lm_head.weight",
            "head.weight",
            "head",
            "embed_out.weight",
            "1.classifier.1.weight",
            "classifier.0.weight",
            "heads.0.weight",
            "heads.head.weight",
            "head.fc.weight",
            "backbone.head.fc.weight",
            "classifier.out_proj.weight",
            "lm_head.dense.weight",
            "head.mlp.0.weight",
            "base_model.model.score.modules_to_save.default.weight",
            "head.parametrizations.weight.original1",
            "blocks.0.exits.head.weight",
        ],
    )
    def test_names_of_output_heads(self, name: str) -> None:
        assert is_head(name, HEADS)

    @pytest.mark.parametrize(
        "name",
        [
            "sa.heads.0.key.weight",
            "blocks.0.sa.heads.0.key.weight",
            "heads.1.value.weight",
            "blocks.3.attention.head.query.weight",
            "layers.0.heads.q_proj.weight",
            "header.weight",
            "0.weight",
            "fc.weight",
            "weight",
        ],
    )
    def test_names_of_attention_heads_and_others(self, name: str) -> None:
        assert not is_head(name, HEADS)

    def test_a_pattern_may_fit_the_whole_name_of_a_head(self) -> None:
        assert is_head("layers.0.gate.weight", ("layers.*.gate.weight",))
        assert not is_head("layers.0.gate.bias", ("layers.*.gate.weight",))

    def test_heads_of_attention_are_rotated(self) -> None:
        def attend(m: Any, x: Tensor) -> Tensor:
            heads = [head["value"](x) * (head["query"](x) * head["key"](x)).sum(-1, keepdim=True) for head in m.heads]
            return m.lm_head(torch.cat(heads, -1))

        parts = [
            nn.ModuleDict({name: nn.Linear(32, 16, bias=False) for name in ("key", "query", "value")}) for _ in range(2)
        ]
        model = Wrapped(attend, heads=nn.ModuleList(parts), lm_head=nn.Linear(32, 48, bias=False))
        found = reasons(model, torch.randn(5, 32))
        assert found.pop("lm_head.weight") is SkipReason.HEAD
        assert set(found.values()) == {None}
        assert len(found) == 6

    def test_names_are_a_setting(self) -> None:
        model = Wrapped(lambda m, x: m.final(m.lm_head(x)), lm_head=nn.Linear(32, 32), final=nn.Linear(32, 16))
        found = reasons(model, torch.randn(5, 32), config=PoetxConfig(block_size=16, heads=("final",)))
        assert found["lm_head.weight"] is None
        assert found["final.weight"] is SkipReason.HEAD

    def test_by_cross_entropy_in_the_graph(self) -> None:
        model = Wrapped(
            lambda m, x, t: F.cross_entropy(m.last(torch.relu(m.first(x)) + x), t),
            first=nn.Linear(32, 32, bias=False),
            last=nn.Linear(32, 16, bias=False),
        )
        found = reasons(model, torch.randn(5, 32), torch.arange(5))
        assert found == {"first.weight": None, "last.weight": SkipReason.HEAD}

    def test_a_head_that_is_no_linear_weight_shields_the_layers_before_it(self) -> None:
        """Cosine classifiers normalise their weight; the residual stream before them is not an output head."""
        model = Wrapped(
            lambda m, x, t: F.cross_entropy(F.linear(torch.relu(m.fc(x)) + x, F.normalize(m.classes)), t),
            fc=nn.Linear(32, 32, bias=False),
            classes=parameter(16, 32),
        )
        found = reasons(model, torch.randn(5, 32), torch.arange(5))
        assert found == {"fc.weight": None, "classes": SkipReason.NOT_A_LINEAR}


class TestExclusion:
    @pytest.mark.parametrize("pattern", ["a", "a.weight", "a.*", "*a.weight", "[a]"])
    def test_by_pattern(self, pattern: str) -> None:
        model = Wrapped(lambda m, x: m.b(m.a(x)), a=nn.Linear(32, 32, bias=False), b=nn.Linear(32, 32, bias=False))
        found = reasons(model, torch.randn(5, 32), config=PoetxConfig(block_size=16, exclude=(pattern,)))
        excluded = SkipReason.EXCLUDED if pattern != "[a]" else None
        assert found == {"a.weight": excluded, "b.weight": None}

    @pytest.mark.parametrize("pattern", ["a", "a.weight", "b", "b.weight", "c.*"])
    def test_by_any_name_of_a_tied_weight(self, pattern: str) -> None:
        model = Wrapped(lambda m, x: m.d(m.b(m.a(x))), **{name: nn.Linear(32, 32, bias=False) for name in "abcd"})
        model.c.weight = model.b.weight = model.a.weight
        config = PoetxConfig(block_size=16, exclude=(pattern,))
        assert reasons(model, torch.randn(5, 32), config=config) == {"a.weight": SkipReason.EXCLUDED, "d.weight": None}

    def test_names_are_those_of_what_is_compiled(self) -> None:
        inner = Wrapped(lambda m, x: m.b(m.a(x)), a=nn.Linear(32, 32, bias=False), b=nn.Linear(32, 32, bias=False))
        outer = nn.ModuleDict({"b": inner})
        found = reasons(inner, torch.randn(5, 32), config=PoetxConfig(block_size=16, exclude=("b.*",)))
        assert found == {"a.weight": None, "b.weight": SkipReason.EXCLUDED}
        assert len(list(outer.parameters())) == 2

    @given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=5), st.data())
    def test_every_component_and_the_whole_name_fit(self, components: list[str], data: st.DataObject) -> None:
        name = ".".join(components)
        assert is_named(name, (name,))
        assert is_named(name, (data.draw(st.sampled_from(components)),))
        assert is_named(name, ("unrelated", "*"))
        assert not is_named(name, ())
        assert not is_named(name, (name + "x", "x" + name))


class TestHooks:
    @pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_a_hook_keeps_the_dense_gradient(self, register: str) -> None:
        layer = nn.Linear(32, 32, bias=False)
        getattr(layer.weight, register)(lambda grad: None)
        assert reasons(layer, torch.randn(5, 32)) == {"weight": SkipReason.GRADIENT_HOOK}

    def test_a_removed_hook_does_not(self) -> None:
        layer = nn.Linear(32, 32, bias=False)
        layer.weight.register_hook(lambda grad: None).remove()
        assert reasons(layer, torch.randn(5, 32)) == {"weight": None}


def test_what_another_graph_found_binds() -> None:
    layer = nn.Linear(32, 32, bias=False)
    captured = capture(layer, torch.randn(5, 32)).normalized()
    matches, skips = match(captured.gm, captured.inputs, CONFIG, lambda weight: SkipReason.TIED)
    assert (matches, [skip.reason for skip in skips]) == ([], [SkipReason.TIED])


class TestNames:
    """Names are those of ``named_parameters()`` wherever Dynamo found the module."""

    @staticmethod
    def names(function: Callable[..., Tensor], *args: Any) -> set[str]:
        matches, skips = capture(function, *args).normalized().matched()
        return set(matches) | set(skips)

    @staticmethod
    def model() -> nn.Module:
        block = nn.ModuleDict({"up": nn.Linear(32, 48), "down": nn.Linear(48, 32)})
        plain = Wrapped(_everything, blocks=nn.ModuleList([block]), seq=nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
        plain.scales = nn.ParameterDict({"outer": parameter(32)})
        plain.biases = nn.ParameterList([parameter(32)])
        return plain

    def test_of_a_compiled_model(self) -> None:
        model = self.model()
        assert self.names(model, torch.randn(5, 32)) == dict(model.named_parameters()).keys()

    def test_of_a_function_over_a_closed_over_model(self) -> None:
        model = self.model()
        assert self.names(lambda x: model(x).sum(), torch.randn(5, 32)) == dict(model.named_parameters()).keys()

    def test_of_a_function_over_a_global_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        monkeypatch.setattr(sys.modules[__name__], "global_model", model)
        assert self.names(_call_global_model, torch.randn(5, 32)) == dict(model.named_parameters()).keys()

    def test_of_a_function_that_is_given_the_model(self) -> None:
        model = self.model()
        names = self.names(lambda m, x: m(x), model, torch.randn(5, 32))
        assert names == dict(model.named_parameters()).keys()

    def test_of_a_compiled_module_inside_another(self) -> None:
        inner = torch.compile(nn.Sequential(nn.Linear(32, 32)), backend="eager")
        assert self.names(nn.Sequential(inner), torch.randn(5, 32)) == {"0.0.weight", "0.0.bias"}

    def test_of_parameters_that_no_module_holds(self) -> None:
        weights = {"query": parameter(32, 32), "key": parameter(32, 32)}
        assert self.names(lambda x: x @ weights["query"] @ weights["key"], torch.randn(5, 32)) == {"query", "key"}

    @given(
        st.lists(st.from_regex(r"[A-Za-z_0-9]{1,8}", fullmatch=True), max_size=4),
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
    )
    def test_read_from_any_depth(self, modules: list[str], leaf: str) -> None:
        path = "".join(f"._modules['{module}']" for module in modules)
        expected = ".".join([module for module in modules if module != "_orig_mod"] + [leaf])
        assert parameter_name(f"L['self']{path}._parameters['{leaf}']") == expected
        assert parameter_name(f"G['model']{path}._parameters['{leaf}']") == expected


def _everything(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = x + block["down"](F.silu(block["up"](x)))
    return model.seq(x) * model.scales["outer"] + model.biases[0]


def _call_global_model(x: Tensor) -> Tensor:
    return global_model(x)
