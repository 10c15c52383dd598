"""Whatever goes wrong during a step or a load: each weight is as before the step or as after it, never between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Experts, factor_of, loss, network, rotating, train, values
from torch import Tensor, nn, optim

from poetx_compile import PoetxError, PoetxWarning, kernels, restore, retraction
from poetx_compile.kernels import naive

exact = partial(torch.testing.assert_close, rtol=0, atol=0)

make = partial(optim.AdamW, lr=0.004, eps=1e-3)
DTYPES = [torch.float32, torch.bfloat16]
ROTATED = (0, 2)


def rotated(model: nn.Module) -> list[Tensor]:
    weights = [model[place].weight for place in ROTATED]
    residuals = [factor_of(weight).residual for weight in weights]
    return [tensor.detach().clone() for tensor in (*weights, *residuals) if tensor is not None]


class Failing:
    """A kernel that finds no memory at one of its calls."""

    def __init__(self, kernel: Callable[..., Any], at: int) -> None:
        self.kernel, self.calls, self.at = kernel, 0, at

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("as much memory as this is not there")
        return self.kernel(*args)


class TestOutOfMemoryInRetraction:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("trained", [0, 2])
    @pytest.mark.parametrize("kernel, at", [("cayley_neumann", 1), ("cayley_neumann", 2), ("rotate_all_", 1)])
    def test_moves_no_rotated_weight(
        self, kernel: str, at: int, trained: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retraction, "SKEWS_PER_BATCH", 1)  # each layer is a batch, as large ones are
        model = network(dtype)
        optimizer = make(model.parameters())
        compiled = rotating(model, permutation_period=3)
        train(compiled, optimizer, range(trained))
        loss(compiled, trained, dtype).backward()
        before = rotated(model)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, kernel, Failing(getattr(kernels, kernel), at))
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        exact(rotated(model), before)
        assert factor_of(model[0].weight).steps == trained

        optimizer.zero_grad()
        loss(compiled, trained + 1, dtype)
        exact(rotated(model), before)
        assert all(factor_of(model[place].weight).is_clean for place in ROTATED)
        train(compiled, optimizer, [trained + 1])
        assert factor_of(model[0].weight).steps == trained + 1
        assert not torch.equal(rotated(model)[0], before[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("make_model, folds", [(network, 2), (Experts, 5)])
    def test_while_folding_lets_no_weight_stay_behind(
        self, make_model: Callable[..., nn.Module], folds: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the device cannot fold, the host does: weight by weight, and matrix by matrix of a stack."""
        settings = {"include_conv": make_model is Experts}
        twin = make_model(dtype)
        optimizer = make(twin.parameters())
        train(rotating(twin, **settings), optimizer, range(2))
        for at in range(1, folds + 1):
            model = make_model(dtype)
            optimizer = make(model.parameters())
            compiled = rotating(model, **settings)
            train(compiled, optimizer, [0])
            with monkeypatch.context() as patch:
                fold = Failing(naive.rotate_, at)
                patch.setattr(naive, "rotate_", fold)
                train(compiled, optimizer, [1])
            assert fold.calls == folds + 1
            exact(values(model), values(twin))

    def test_leaves_a_state_that_can_be_saved_and_resumed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = network(torch.bfloat16)
        optimizer = make(model.parameters())
        compiled = rotating(model)
        loss(compiled, 0, torch.bfloat16).backward()
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(kernels, "cayley_neumann", Failing(kernels.cayley_neumann, 1))
            optimizer.step()
        optimizer.zero_grad()
        twin = network(torch.bfloat16)
        its_optimizer = make(twin.parameters())
        twin.load_state_dict(model.state_dict())
        its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(compiled, optimizer, range(1, 4))
        train(rotating(twin), its_optimizer, range(1, 4))
        exact(values(twin), values(model))


class Stumbling(optim.AdamW):
    """A step that raises at its very end."""

    is_bad = False

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if self.is_bad:
            raise ArithmeticError

    def stumble(self) -> None:
        self.is_bad = True
        with pytest.raises(ArithmeticError):
            self.step()
        self.is_bad = False


class TestStepsThatRaise:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_very_first(self, dtype: torch.dtype) -> None:
        """Moments that were made in it are a rotation's, though no step ever ended."""
        model = network(dtype)
        optimizer = Stumbling(model.parameters(), lr=0.004)
        compiled = rotating(model)
        loss(compiled, 0, dtype).backward()
        before = rotated(model)
        optimizer.stumble()
        optimizer.zero_grad()
        loss(compiled, 1, dtype).backward()
        exact(rotated(model), before)
        optimizer.step()
        assert not torch.equal(rotated(model)[0], before[0])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("period", [0, 2])
    def test_going_back_to_a_checkpoint(self, dtype: torch.dtype, period: int) -> None:
        runs = []
        for stumbles in (False, True):
            torch._dynamo.reset()
            model = network(dtype)
            optimizer, compiled = Stumbling(model.parameters(), lr=0.004), rotating(model, permutation_period=period)
            train(compiled, optimizer, range(3))
            weights, states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            train(compiled, optimizer, range(3, 5))
            if stumbles:
                loss(compiled, 5, dtype).backward()
                optimizer.stumble()
                optimizer.zero_grad()
            model.load_state_dict(weights)
            optimizer.load_state_dict(states)
            train(compiled, optimizer, range(3, 6))
            runs.append(rotated(model))
        exact(*runs)

    def test_restored_weights_train_on(self) -> None:
        model = network()
        optimizer, compiled = Stumbling(model.parameters(), lr=0.004), rotating(model)
        train(compiled, optimizer, range(2))
        loss(compiled, 2).backward()
        optimizer.stumble()
        before = values(model)
        restore(model)
        exact(values(model), before)
        assert all(any(p is weight for p in optimizer.param_groups[0]["params"]) for weight in model.parameters())
        optimizer.zero_grad()
        train(model, optimizer, [3])
        assert not torch.equal(values(model)[0], before[0])

    def test_a_hook_after_the_step(self) -> None:
        """The weights are folded by then: as after the step."""
        model, twin = network(), network()
        optimizer, its_optimizer = make(model.parameters()), make(twin.parameters())

        def fail(*_: object) -> None:
            raise ArithmeticError

        loss(rotating(model), 0).backward()
        optimizer.register_step_post_hook(fail)
        with pytest.raises(ArithmeticError):
            optimizer.step()
        train(rotating(twin), its_optimizer, [0])
        exact(values(model), values(twin))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_no_numbers_keep_weight_and_residual(bad: float, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    compiled = rotating(model)
    train(compiled, optimizer, range(2))
    before = rotated(model)
    (loss(compiled, 2, dtype) * bad).backward()
    with pytest.warns(PoetxWarning, match="NaN or infinite"):
        optimizer.step()
    exact(rotated(model), before)


class TestBrokenCheckpoints:
    def saved(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        model = network(dtype)
        optimizer = make(model.parameters())
        train(rotating(model), optimizer, range(3))
        path = folder / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        return path

    @pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
    def test_a_truncated_file_loads_nothing(self, kept: float, tmp_path: Path) -> None:
        path = self.saved(tmp_path)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with pytest.raises((RuntimeError, EOFError, OSError)):
            torch.load(path, weights_only=True)

    @pytest.mark.parametrize("place", range(2))
    def test_a_flipped_bit_of_a_half_precision_weight_drops_its_residual(self, place: int, tmp_path: Path) -> None:
        content = torch.load(self.saved(tmp_path), weights_only=True)
        name = f"{ROTATED[place]}.weight"
        content["model"][name].view(torch.int16)[3, 5] ^= 1
        model = network(torch.bfloat16)
        optimizer = make(model.parameters())
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        with pytest.warns(PoetxWarning, match=f"'{name}' is not the weight that this optimizer state was saved with"):
            loss(rotating(model), 3, torch.bfloat16)
        dropped, kept = (factor_of(model[ROTATED[index]].weight).residual for index in (place, 1 - place))
        assert not dropped.any() and kept.any()

    def test_a_weight_of_another_shape_is_refused_by_torch_and_changes_none(self, tmp_path: Path) -> None:
        content = torch.load(self.saved(tmp_path), weights_only=True)
        content["model"]["2.weight"] = content["model"]["2.weight"][:, :-1]
        model = network(torch.bfloat16)
        rotating(model)
        before = values(model)[2]
        with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight"):
            model.load_state_dict(content["model"])
        exact(values(model)[2], before)

    @pytest.mark.parametrize("sizes", [(20, 32), (32, 24)])
    def test_state_of_a_weight_of_another_shape_is_refused_before_any_is_touched(
        self, sizes: tuple[int, int], tmp_path: Path
    ) -> None:
        content = torch.load(self.saved(tmp_path, torch.float32), weights_only=True)
        other = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 20, bias=False), nn.LayerNorm(20))
        optimizer = make(other.parameters())
        optimizer.load_state_dict(content["optimizer"])
        before = values(other)
        rotating(other)(torch.ones(3, sizes[0])).sum().backward()
        with pytest.raises(PoetxError, match=rf"'0\.weight' rotates 32 x 22, the weight is {sizes[1]} x {sizes[0]}"):
            optimizer.step()
        exact(values(other), before)
