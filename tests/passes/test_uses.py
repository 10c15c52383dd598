"""Where a weight goes: through views, into subgraphs, to products, embeddings and losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, capture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poetx_compile.passes.uses import Use, UseGraph

X = torch.randn(5, 48)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(48, 48))


def graph_of(captured: Captured) -> UseGraph:
    return UseGraph(captured.gm, captured.inputs)


def uses(function: Callable[[Tensor], Tensor], weight: nn.Parameter, x: Tensor = X) -> list[Use]:
    captured = capture(function, x)
    return list(graph_of(captured).uses(captured.placeholder(weight)))


def test_direct_use_knows_its_place(weight: nn.Parameter) -> None:
    (use,) = uses(lambda x: F.linear(x, weight), weight)
    assert (use.node.target, use.operand, use.direct) == (torch._C._nn.linear, 1, True)
    assert use.is_product and not use.is_embedding


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.H,
        lambda w: w.transpose(0, 1).contiguous(),
        lambda w: w.reshape(-1).view(48, 48),
        lambda w: w.reshape(24, -1).view_as(w),
        lambda w: w[:24],
        lambda w: w[:, 4:36],
        lambda w: w.chunk(2)[0],
        lambda w: w.split(16)[2],
        lambda w: w.unbind()[0][None],
        lambda w: w.narrow(0, 1, 8),
        lambda w: w.select(0, 3)[None],
        lambda w: w.unsqueeze(0).squeeze(0).clone(),
        lambda w: w.double().half().float(),
        lambda w: w.to(torch.float32),
        lambda w: torch.cat([w, w * 0 + 1]),
        lambda w: torch.stack([w])[0],
    ],
)
def test_views_are_looked_through(view: Callable[[Tensor], Tensor], weight: nn.Parameter) -> None:
    found = uses(lambda x: torch.einsum("ni,oi->no", x[:, : view(weight).shape[1]], view(weight)), weight)
    assert any(use.is_product and not use.direct for use in found)


def test_one_use_for_each_view_that_is_used(weight: nn.Parameter) -> None:
    def function(x: Tensor) -> Tensor:
        upper, lower = weight.chunk(2)
        return F.linear(x, upper) + F.linear(x, lower) + F.linear(x, weight)[:, :24]

    found = uses(function, weight)
    assert sorted(use.direct for use in found) == [False, False, True]
    assert all(use.is_product for use in found)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: x.type_as(w),
        lambda x, w: x.to(w),
        lambda x, w: x.view(48, -1).view_as(w),
        lambda x, w: x.reshape_as(w),
        lambda x, w: x[:1].expand_as(w),
    ],
)
def test_to_be_a_model_of_shape_or_dtype_is_no_use(read: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter) -> None:
    captured = capture(lambda x: read(x, weight) + 1, torch.randn(48, 48))
    assert list(graph_of(captured).uses(captured.placeholder(weight))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.addmm(mat2=w[:, :9], mat1=x, input=x[:, :9]),
        lambda x, w: F.linear(weight=w[:9], input=x),
        lambda x, w: torch.mm(mat2=w[:, :9], input=x),
        lambda x, w: torch.baddbmm(batch1=x[None], batch2=w[None], input=x[None]),
    ],
)
def test_keywords_say_where_an_operand_stands(function: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter) -> None:
    (use,) = uses(lambda x: function(x, weight), weight)
    assert use.is_product


def test_what_is_added_by_keyword_is_no_factor(weight: nn.Parameter) -> None:
    (use,) = uses(lambda x: torch.addmm(mat1=x, mat2=x.t(), input=weight[:5, :5]), weight)
    assert not use.is_product


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x + w[:5],
        lambda x, w: x * w.sum(),
        lambda x, w: F.linear(w, x),
        lambda x, w: F.linear(x, F.normalize(w)),
        lambda x, w: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=w[:5, :5]),
    ],
)
def test_other_uses_are_no_products(function: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter) -> None:
    assert not all(use.is_product for use in uses(lambda x: function(x, weight), weight))


@pytest.mark.parametrize(
    "lookup",
    [
        lambda x, w: F.embedding(x, w),
        lambda x, w: F.embedding_bag(x, w, torch.tensor([0])),
        lambda x, w: w.index_select(0, x),
        lambda x, w: torch.index_select(w, 0, x),
    ],
)
def test_embeddings(lookup: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter) -> None:
    (use,) = uses(lambda x: lookup(x, weight), weight, torch.tensor([1, 2]))
    assert use.is_embedding


def test_attention_masks_are_no_weights_of_attention() -> None:
    """A learned bias in the scores stands beside the projections, in one opaque call."""
    attention = nn.MultiheadAttention(48, 4)
    bias = nn.Parameter(torch.randn(5, 5))
    captured = capture(lambda x: attention(x, x, x, attn_mask=bias, need_weights=False)[0], X)
    graph = graph_of(captured)
    for parameter, expected in ((attention.in_proj_weight, True), (attention.out_proj.weight, True), (bias, False)):
        (use,) = graph.uses(captured.placeholder(parameter))
        assert use.is_product is expected


def test_checkpointed_regions_are_entered(weight: nn.Parameter) -> None:
    (use,) = uses(lambda x: checkpoint(lambda y: F.linear(y, weight.t()), x, use_reentrant=False) + 1, weight)
    assert use.is_product and not use.direct


def test_checkpoints_within_checkpoints(weight: nn.Parameter) -> None:
    def inside(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y + F.linear(y, weight), torch.tanh(x), use_reentrant=False)

    (use,) = uses(lambda x: checkpoint(inside, x, use_reentrant=False), weight)
    assert use.is_product


def test_one_tensor_twice_into_a_checkpoint(weight: nn.Parameter) -> None:
    found = uses(lambda x: checkpoint(lambda y, z: F.linear(y, weight) * z, x, x, use_reentrant=False), weight)
    assert [use.is_product for use in found] == [True]


class TestData:
    """``has_data``: whether the other side of a product comes from anything but parameters."""

    @staticmethod
    def has_data(function: Callable[[Tensor], Tensor], weight: nn.Parameter, dynamic: bool | None = None) -> list[bool]:
        captured = capture(function, X, dynamic=dynamic)
        graph = graph_of(captured)
        return [graph.has_data(use) for use in graph.uses(captured.placeholder(weight)) if use.is_product]

    def test_activation(self, weight: nn.Parameter) -> None:
        assert self.has_data(lambda x: torch.tanh(x) @ weight, weight) == [True]

    def test_constant_made_in_the_graph(self, weight: nn.Parameter) -> None:
        assert self.has_data(lambda x: x + torch.arange(48.0) @ weight, weight) == [True]

    def test_parameter(self, weight: nn.Parameter) -> None:
        other = nn.Parameter(torch.randn(48, 48))
        assert self.has_data(lambda x: x + (torch.tanh(other) @ weight)[:5], weight) == [False]

    def test_itself(self, weight: nn.Parameter) -> None:
        assert self.has_data(lambda x: x + (weight @ weight.t())[:5], weight) == [False, False]

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_a_batch_size_is_no_data(self, weight: nn.Parameter, dynamic: bool) -> None:
        query = nn.Parameter(torch.randn(1, 48))
        assert self.has_data(lambda x: x + query.expand(x.shape[0], -1) @ weight, weight, dynamic) == [False]

    def test_checkpointed_activation(self, weight: nn.Parameter) -> None:
        assert self.has_data(lambda x: checkpoint(lambda y: y @ weight, x * 2, use_reentrant=False), weight) == [True]


class TestLoss:
    """``reaches_loss``: what marks an output head whatever its name."""

    @staticmethod
    def reaches(function: Callable[[Tensor], Tensor], weight: nn.Parameter, *others: nn.Parameter) -> bool:
        captured = capture(function, X)
        graph = graph_of(captured)
        linears = {use.node for other in (weight, *others) for use in graph.uses(captured.placeholder(other))}
        (use,) = graph.uses(captured.placeholder(weight))
        return graph.reaches_loss(use.node, linears)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda y, t: F.cross_entropy(y, t),
            lambda y, t: nn.CrossEntropyLoss(label_smoothing=0.1)(y.float().view(-1, 48), t),
            lambda y, t: F.nll_loss(F.log_softmax(y, -1), t),
            lambda y, t: F.cross_entropy(torch.tanh(y / 30) * 30, t),
        ],
    )
    def test_last_linear(self, loss: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter) -> None:
        target = torch.arange(5)
        assert self.reaches(lambda x: loss(F.linear(x, weight), target), weight)

    def test_not_the_one_before(self, weight: nn.Parameter) -> None:
        head = nn.Parameter(torch.randn(48, 48))
        target = torch.arange(5)
        assert not self.reaches(lambda x: F.cross_entropy(F.linear(F.linear(x, weight) + x, head), target), weight, head)

    def test_not_for_regression(self, weight: nn.Parameter) -> None:
        assert not self.reaches(lambda x: F.mse_loss(F.linear(x, weight), x), weight)
