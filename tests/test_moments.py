"""What becomes of optimizer states at new permutations, against dense skew matrices over all channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Experts, Explicit, factor_of, loss, network, rotating, train, values
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from poetx_compile import PoetxConfig, PoetxError
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.moments import carried
from poetx_compile.optim import SkewMuon

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def dense(factor: OrthogonalFactor, packed: Tensor, sign: int) -> list[list[Tensor]]:
    """A packed state as a matrix over all channels, NaN where nothing is known: by matrix of the stack, and side.

    Args:
        sign: of an entry below the diagonal: −1 for first moments, 1 for second.
    """
    found = []
    for row in packed.view(factor.stack.count, -1):
        at, matrices = 0, []
        for side, channels in ((factor.rows, factor.row_channels), (factor.columns, factor.column_channels)):
            full = torch.full((side.features, side.features), float("nan"), dtype=packed.dtype)
            for block in channels.view(side.count, -1):
                for i in range(side.width):
                    for j in range(i + 1, side.width):
                        full[block[i], block[j]] = row[at]
                        full[block[j], block[i]] = sign * row[at]
                        at += 1
            matrices.append(full)
        found.append(matrices)
    return found


def expected(factor: OrthogonalFactor, known: list[list[Tensor]], old: Tensor, is_first: bool) -> Tensor:
    numbers = []
    for matrices, row in zip(known, old.view(factor.stack.count, -1)):
        rest = [0.0, 0.0] if is_first else [part.mean() for part in row.split((factor.rows.skew, factor.columns.skew))]
        channels = (factor.row_channels, factor.column_channels)
        for full, side, order, unknown in zip(matrices, (factor.rows, factor.columns), channels, rest):
            for block in order.view(side.count, -1):
                rows, columns = torch.triu_indices(side.width, side.width, 1)
                found = full[block[rows], block[columns]]
                numbers.append(torch.where(found.isnan(), unknown, found))
    return torch.cat(numbers)


class TestCarried:
    @given(
        shape=st.sampled_from([(1, 22, 32), (1, 40, 18), (2, 16, 24)]),
        chunk=st.sampled_from([1, 2, 4]),
        epochs=st.integers(1, 3),
        seed=st.integers(0, 50),
    )
    def test_transport_keeps_what_shares_a_block_again(
        self, shape: tuple[int, int, int], chunk: int, epochs: int, seed: int
    ) -> None:
        config = PoetxConfig(block_size=8, chunk=chunk, seed=seed, permutation_period=1, moments="transport")
        factor = OrthogonalFactor(nn.Parameter(torch.randn(shape).double()), "w", config)
        first, second = torch.randn_like(factor.q), torch.rand_like(factor.q)
        known = {name: dense(factor, state.data, sign) for name, state, sign in (("m", first, -1), ("v", second, 1))}
        for _ in range(epochs):
            factor.count_step()
        entry = {"step": torch.tensor(3.0), "exp_avg": first.data, "exp_avg_sq": second.data, "poetx_moments": 0}
        moved = carried(factor, entry)
        assert moved is not None
        close(moved["exp_avg"], expected(factor, known["m"], first.data, True))
        close(moved["exp_avg_sq"], expected(factor, known["v"], second.data, False))
        assert moved["step"] == 3
        assert bool((moved["exp_avg"] != 0).any())

    def test_the_same_blocks_keep_everything(self) -> None:
        config = PoetxConfig(block_size=32, chunk=4, permutation_period=1, moments="transport")
        factor = OrthogonalFactor(nn.Parameter(torch.randn(32, 32).double()), "w", config)
        skew = torch.randn_like(factor.q).data
        before = dense(factor, skew, -1)
        factor.count_step()
        moved = carried(factor, {"exp_avg": skew, "poetx_moments": 0})
        assert moved is not None
        assert not torch.equal(moved["exp_avg"], skew), "the order within the only block has changed"
        for old, new in zip(before[0], dense(factor, moved["exp_avg"], -1)[0]):
            exact(new.nan_to_num(), old.nan_to_num())

    def test_second_and_keep_and_reset(self) -> None:
        entry: dict[str, Any] = {}
        for moments in ("second", "keep", "reset"):
            config = PoetxConfig(block_size=8, chunk=2, permutation_period=1, moments=moments)
            factor = OrthogonalFactor(nn.Parameter(torch.randn(24, 16).double()), "w", config)
            first, second = torch.randn_like(factor.q).data, torch.rand_like(factor.q).data
            entry = {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second, "poetx_moments": 0}
            factor.count_step()
            moved = carried(factor, entry)
            if moments == "reset":
                assert moved is None
            elif moments == "keep":
                assert moved is entry
            else:
                assert moved is not None
                exact(moved["exp_avg"], torch.zeros_like(first))
                rows, columns = second.split((factor.rows.skew, factor.columns.skew))
                close(moved["exp_avg_sq"], torch.cat([rows.mean().expand_as(rows), columns.mean().expand_as(columns)]))


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "AdamW": partial(optim.AdamW, lr=0.01, amsgrad=True),
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9),
    "RMSprop": partial(optim.RMSprop, lr=0.005, centered=True, momentum=0.5),
    "Adagrad": partial(optim.Adagrad, lr=0.02),
    "Adamax": partial(optim.Adamax, lr=0.01),
}


class TestTraining:
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    @pytest.mark.parametrize("moments", ["keep", "second", "transport"])
    def test_goes_on_as_the_explicit_parametrisation_with_its_states_carried(self, kind: str, moments: str) -> None:
        model = network()
        options = {"permutation_period": 2, "moments": moments}
        explicit = Explicit(model, **options)
        train(rotating(model, **options), OPTIMIZERS[kind](model.parameters()), range(5))

        theirs = OPTIMIZERS[kind](explicit.parameters())
        for step in range(5):
            train(explicit, theirs, [step])
            explicit.fold()
            if step % 2:
                for name, factor in explicit.factors.items():
                    state = theirs.state[explicit.skews[name]]
                    factor.epoch += 1
                    factor.draw()
                    moved = carried(factor, {**state, "poetx_moments": factor.epoch - 1})
                    assert moved is not None
                    theirs.state[explicit.skews[name]] = {
                        key: value for key, value in moved.items() if key != "poetx_moments"
                    }
        close(values(model), values(explicit.model))

    @pytest.mark.parametrize("moments", ["reset", "keep", "second", "transport"])
    @pytest.mark.parametrize("saved_at", [1, 2, 3])
    def test_resumes_exactly(self, moments: str, saved_at: int) -> None:
        options = {"permutation_period": 2, "moments": moments}

        def fresh() -> tuple[nn.Module, Any, optim.Optimizer]:
            torch._dynamo.reset()
            model = network(torch.bfloat16)
            return model, rotating(model, **options), optim.AdamW(model.parameters(), lr=0.01)

        model, compiled, optimizer = fresh()
        train(compiled, optimizer, range(5))
        started, recompiled, before = fresh()
        train(recompiled, before, range(saved_at))
        resumed, again, after = fresh()
        resumed.load_state_dict(started.state_dict())
        after.load_state_dict(before.state_dict())
        train(again, after, range(saved_at, 5))
        exact(values(resumed), values(model))

    def test_skew_muon_and_stacks(self) -> None:
        model = Experts()
        compiled = rotating(model, permutation_period=1, moments="transport")
        optimizer = SkewMuon(model.parameters(), lr=0.01)
        train(compiled, optimizer, range(3))
        assert factor_of(model.experts).epoch == 3
        assert optimizer.state[model.experts]["step"] == 3

    @pytest.mark.parametrize(("make", "name"), [(optim.Rprop, "prev"), (optim.Adadelta, "acc_delta")])
    def test_states_that_it_does_not_know_are_refused(self, make: type[optim.Optimizer], name: str) -> None:
        model = network()
        compiled = rotating(model, permutation_period=9, moments="transport")
        optimizer = make(model.parameters())
        train(compiled, optimizer, [0])
        before = values(model)
        loss(compiled, 1).backward()
        with pytest.raises(PoetxError, match=r"moments='transport' cannot carry the state '\w+' of '0\.weight'.*reset"):
            optimizer.step()
        exact(values(model), before)
        assert name in optimizer.state[model[0].weight]
