"""``torch.save`` and ``torch.load`` as every script uses them: training goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Experts, factor_of, loss, network, rotating, train, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch._dynamo.exc import BackendCompilerFailed
from torch.optim import Optimizer

import poetx_compile
from poetx_compile import PoetxError, PoetxWarning, backend
from poetx_compile.registry import factors

exact = partial(torch.testing.assert_close, rtol=0, atol=0)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(optim.AdamW, lr=0.004, eps=1e-3),
    "AdamW, fused": partial(optim.AdamW, lr=0.004, eps=1e-3, fused=True),
    "AdamW, foreach, amsgrad": partial(optim.AdamW, lr=0.004, eps=1e-3, foreach=True, amsgrad=True),
    "SGD": partial(optim.SGD, lr=0.05),
    "SGD, momentum": partial(optim.SGD, lr=0.02, momentum=0.9),
    "Adagrad": partial(optim.Adagrad, lr=0.01, eps=1e-3),
    "Adafactor": partial(optim.Adafactor, lr=0.004),
    "RMSprop": partial(optim.RMSprop, lr=0.002, eps=1e-3, momentum=0.5),
    "Rprop": partial(optim.Rprop, lr=0.002),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAST = 8


class Run:
    """A training script: what it builds, saves and loads."""

    def __init__(self, kind: str = "AdamW", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model: nn.Module = network(dtype)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        self.options = options
        self.compiled: Callable[[Tensor], Tensor] = self.model

    def compile(self) -> Run:
        self.compiled = rotating(self.model, **self.options)
        return self

    def forward(self) -> None:
        loss(self.compiled, 77, next(self.model.parameters()).dtype)

    def train(self, first: int, last: int) -> Run:
        train(self.compiled, self.optimizer, range(first, last))
        return self

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file

    def load_model(self, file: io.BytesIO) -> None:
        self.model.load_state_dict(read(file)["model"])

    def load_optimizer(self, file: io.BytesIO) -> None:
        self.optimizer.load_state_dict(read(file)["optimizer"])

    def load(self, file: io.BytesIO) -> Run:
        self.load_model(file)
        self.load_optimizer(file)
        return self


def read(file: io.BytesIO) -> Any:
    file.seek(0)
    return torch.load(file, weights_only=True)


def before_compilation(run: Run, file: io.BytesIO) -> None:
    run.load(file).compile()


def before_the_first_forward(run: Run, file: io.BytesIO) -> None:
    run.compile().load(file)


def optimizer_before_model(run: Run, file: io.BytesIO) -> None:
    run.compile().load_optimizer(file)
    run.load_model(file)


def after_the_first_forward(run: Run, file: io.BytesIO) -> None:
    run.compile().forward()
    run.load(file)


def after_some_training(run: Run, file: io.BytesIO) -> None:
    run.compile().train(50, 53).load(file)


def after_some_training_optimizer_first(run: Run, file: io.BytesIO) -> None:
    run.compile().train(50, 53).load_optimizer(file)
    run.load_model(file)


MOMENTS = [
    before_compilation,
    before_the_first_forward,
    optimizer_before_model,
    after_the_first_forward,
    after_some_training,
    after_some_training_optimizer_first,
]


def state(file: io.BytesIO) -> dict[str, Any]:
    """What a checkpoint says of the optimizer, flat."""
    entries = read(file)["optimizer"]["state"].items()
    return {f"{index}.{name}": value for index, entry in entries for name, value in entry.items() if value is not None}


class TestResume:
    @pytest.mark.parametrize("period", [0, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=14)
    @given(
        kind=st.sampled_from(list(OPTIMIZERS)),
        load=st.sampled_from(MOMENTS),
        saved_at=st.integers(1, 6),
        saved_again=st.integers(0, 2),
    )
    def test_is_exact(
        self,
        dtype: str,
        period: int,
        kind: str,
        load: Callable[[Run, io.BytesIO], None],
        saved_at: int,
        saved_again: int,
    ) -> None:
        make = partial(Run, kind, DTYPES[dtype], permutation_period=period)
        run = make().compile().train(0, saved_at)
        file = run.save()
        for _ in range(saved_again):
            between = make().compile().load(file)
            if saved_again == 2:
                between.forward()
            file = between.save()

        resumed = make()
        load(resumed, file)
        exact(values(resumed.model), values(run.model))
        run.train(saved_at, LAST)
        resumed.train(saved_at, LAST)
        exact(values(resumed.model), values(run.model))
        exact(state(resumed.save()), state(run.save()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("load", MOMENTS[::2])
    def test_is_exact_for_stacks_and_kernels(self, dtype: str, load: Callable[[Run, io.BytesIO], None]) -> None:
        def start() -> Run:
            run = Run(dtype=DTYPES[dtype], permutation_period=3, include_conv=True)
            run.model = Experts(DTYPES[dtype])
            run.optimizer = OPTIMIZERS["AdamW"](run.model.parameters())
            return run

        run = start().compile().train(0, 4)
        assert sum(factors.of_weight(parameter) is not None for parameter in run.model.parameters()) == 3
        resumed, file = start(), run.save()
        load(resumed, file)
        run.train(4, LAST)
        resumed.train(4, LAST)
        exact(values(resumed.model), values(run.model))
        exact(state(resumed.save()), state(run.save()))

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @settings(max_examples=8)
    @given(kind=st.sampled_from(list(OPTIMIZERS)), load=st.sampled_from(MOMENTS), saved_at=st.integers(1, 6))
    def test_is_exact_with_bfloat16_skews(
        self, dtype: str, kind: str, load: Callable[[Run, io.BytesIO], None], saved_at: int
    ) -> None:
        make = partial(Run, kind, DTYPES[dtype], permutation_period=3, skew_dtype="bfloat16")
        run = make().compile().train(0, saved_at)
        weight = run.model[0].weight
        assert weight.grad is None
        assert factor_of(weight).q.dtype == torch.bfloat16
        moments = [value for value in run.optimizer.state[weight].values() if torch.is_tensor(value)]
        assert all(value.dtype == torch.bfloat16 for value in moments if value.shape == factor_of(weight).q.shape)
        resumed, file = make(), make().compile().load(run.save()).save()
        load(resumed, file)
        run.train(saved_at, LAST)
        resumed.train(saved_at, LAST)
        exact(values(resumed.model), values(run.model))
        exact(state(resumed.save()), state(run.save()))

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    @pytest.mark.parametrize("bits", [4, 0])
    @settings(max_examples=6)
    @given(load=st.sampled_from(MOMENTS), saved_at=st.integers(1, 6), saved_again=st.booleans())
    def test_is_exact_with_fewer_bits(
        self, dtype: str, bits: int, load: Callable[[Run, io.BytesIO], None], saved_at: int, saved_again: bool
    ) -> None:
        make = partial(Run, "AdamW", DTYPES[dtype], permutation_period=3, residual_bits=bits)
        run = make().compile().train(0, saved_at)
        file = make().compile().load(run.save()).save() if saved_again else run.save()
        resumed = make()
        load(resumed, file)
        run.train(saved_at, LAST)
        resumed.train(saved_at, LAST)
        exact(values(resumed.model), values(run.model))
        exact(state(resumed.save()), state(run.save()))

    @pytest.mark.parametrize("sides", ["rows", "columns"])
    def test_one_side_resumes_exactly(self, sides: str) -> None:
        run = Run(dtype=torch.bfloat16, sides=sides, permutation_period=3).compile().train(0, 4)
        resumed = Run(dtype=torch.bfloat16, sides=sides, permutation_period=3).compile().load(run.save()).train(4, LAST)
        exact(values(resumed.model), values(run.train(4, LAST).model))

    def test_of_a_checkpoint_that_names_no_bits_is_one_with_eight(self) -> None:
        run = Run(dtype=torch.bfloat16).compile().train(0, 4)
        saved = read(run.save())
        for entry in saved["optimizer"]["state"].values():
            entry.pop("poetx_residual_bits", None)
        older = io.BytesIO()
        torch.save(saved, older)
        resumed = Run(dtype=torch.bfloat16).compile().load(older).train(4, LAST)
        exact(values(resumed.model), values(run.train(4, LAST).model))
        other = Run(dtype=torch.bfloat16, residual_bits=0).compile().load(older)
        with pytest.raises(PoetxError, match="trained with residual_bits=8, this run asks for 0"):
            other.train(4, 5)

    @pytest.mark.parametrize("bits", [8, 4, 0])
    def test_in_a_new_process(self, tmp_path: Path, bits: int) -> None:
        run = Run(dtype=torch.bfloat16, permutation_period=3, residual_bits=bits).compile().train(0, 4)
        (tmp_path / "checkpoint.pt").write_bytes(run.save().getvalue())
        script = """
            import io, pathlib, sys
            import torch
            from test_checkpoint import LAST, Run
            folder = pathlib.Path(sys.argv[1])
            torch.set_num_threads(int(sys.argv[2]))
            run = Run(dtype=torch.bfloat16, permutation_period=3, residual_bits=int(sys.argv[3]))
            run.load(io.BytesIO((folder / "checkpoint.pt").read_bytes())).compile().train(4, LAST)
            (folder / "result.pt").write_bytes(run.save().getvalue())
        """
        command = [sys.executable, "-c", textwrap.dedent(script), tmp_path, str(torch.get_num_threads()), str(bits)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        run.train(4, LAST)
        exact(state(io.BytesIO((tmp_path / "result.pt").read_bytes())), state(run.save()))
        exact(torch.load(tmp_path / "result.pt")["model"], run.model.state_dict())

    @pytest.mark.parametrize("make", [partial(optim.NAdam, lr=0.004), partial(optim.ASGD, lr=0.02)])
    def test_keeps_numbers_that_torch_would_round(self, make: Callable[..., Optimizer]) -> None:
        """Scalars of the state of bfloat16 weights: torch casts those of ordinary parameters."""

        def start() -> tuple[nn.Sequential, Optimizer]:
            model = network(torch.bfloat16)
            for parameter in (model[0].bias, *model[3].parameters()):
                parameter.requires_grad_(False)
            return model, make([model[0].weight, model[2].weight])

        model, optimizer = start()
        compiled = rotating(model)
        train(compiled, optimizer, range(4))
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(compiled, optimizer, range(4, LAST))

        twin, its_optimizer = start()
        twin.load_state_dict(checkpoint[0])
        its_optimizer.load_state_dict(checkpoint[1])
        train(rotating(twin), its_optimizer, range(4, LAST))
        exact(values(twin), values(model))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_from_a_deep_copy_that_never_ran(self, dtype: torch.dtype) -> None:
        run = Run(dtype=dtype, permutation_period=3).compile().train(0, 4)
        best = Run(dtype=dtype)
        best.model, best.optimizer = copy.deepcopy((run.model, run.optimizer))
        resumed = Run(dtype=dtype, permutation_period=3).load(best.save()).compile().train(4, LAST)
        exact(values(resumed.model), values(run.train(4, LAST).model))

    def test_from_a_checkpoint_saved_before_the_first_step(self) -> None:
        run = Run().compile()
        run.forward()
        resumed = Run().load(run.save()).compile().train(0, 3)
        exact(values(resumed.model), values(run.train(0, 3).model))

    @pytest.mark.parametrize("storage", ["folded", "bf16-lean"])
    def test_going_back_to_before_the_first_step(self, storage: str) -> None:
        run = Run(dtype=torch.bfloat16, permutation_period=3, storage=storage).compile()
        run.forward()
        file = run.save()
        first = values(run.train(0, LAST).model)
        exact(values(run.load(file).train(0, LAST).model), first)

    @pytest.mark.parametrize("kind", ["AdamW", "SGD, momentum"])
    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize(("saved", "now"), [("bf16", "fp32"), ("fp16", "bf16")])
    def test_after_the_model_took_another_dtype(self, saved: str, now: str, steps: int, kind: str) -> None:
        def new(dtype: str) -> Run:
            run = Run(dtype=DTYPES[dtype])
            weights = [run.model[0].weight, run.model[2].weight]  # torch leaves moments of others in their dtype
            run.optimizer = OPTIMIZERS[kind](weights)
            return run.compile()

        run = new(saved).train(0, 3)
        run.model.to(DTYPES[now])
        resumed = new(now).load(run.train(3, 3 + steps).save())
        exact(values(resumed.train(3 + steps, LAST).model), values(run.train(3 + steps, LAST).model))

    def test_with_a_weight_that_had_no_gradient_yet(self) -> None:
        run = Run(permutation_period=2).compile()
        for step in range(3):
            loss(run.compiled, step, torch.float32).backward()
            run.model[0].weight.grad = None
            run.optimizer.step()
            run.optimizer.zero_grad()
        resumed = Run(permutation_period=2).compile().load(run.save()).train(3, LAST)
        exact(values(resumed.model), values(run.train(3, LAST).model))

    @pytest.mark.parametrize("saved, now", [("fp32", "bf16"), ("fp32", "fp64"), ("fp16", "fp16")])
    def test_moments_fit_weights_of_another_dtype(self, saved: str, now: str) -> None:
        file = Run(dtype=DTYPES[saved]).compile().train(0, 4).save()
        run = Run(dtype=DTYPES[now]).compile().load(file).train(4, LAST)
        weight = run.model[0].weight
        assert run.optimizer.state[weight]["exp_avg"].dtype == factor_of(weight).q.dtype

    def test_after_a_step_that_raised(self) -> None:
        run = Run(dtype=torch.bfloat16).compile().train(0, 4)
        file = run.save()
        loss(run.compiled, 4, torch.bfloat16).backward()
        run.optimizer.register_step_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.optimizer.step()
        exact(state(run.save()), state(file))

    def test_of_the_model_alone_starts_anew(self) -> None:
        run = Run(permutation_period=3).compile().train(0, 5)
        fresh = Run(permutation_period=3).compile()
        fresh.load_model(run.save())
        fresh.train(5, LAST)
        assert factor_of(fresh.model[0].weight).steps == LAST - 5


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class TestModelStateDict:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_that_of_the_plain_model(self, dtype: str) -> None:
        run = Run(dtype=DTYPES[dtype]).compile().train(0, 4)
        plain = network(DTYPES[dtype])
        assert list(run.model.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(read(run.save())["model"])
        x = torch.randn(5, 22).to(DTYPES[dtype])
        exact(plain(x), run.model(x))
        exact(plain(x), run.compiled(x))


class TestRefusals:
    """What cannot go on exactly does not go on in silence."""

    @pytest.mark.parametrize(
        "name, saved, asked", [("block_size", 8, 16), ("chunk", 2, 4), ("scale", 0.5, 1.0), ("residual_bits", 4, 8)]
    )
    @pytest.mark.parametrize("load", [before_compilation, after_the_first_forward])
    def test_other_blocks(self, name: str, saved: float, asked: float, load: Callable[[Run, io.BytesIO], None]) -> None:
        file = Run(**{name: saved}).compile().train(0, 2).save()
        run = Run(**{name: asked})
        load(run, file)
        with pytest.raises(PoetxError, match=rf"'0\.weight' was trained with {name}={saved}.*options={{'{name}': {saved}}}"):
            run.train(2, 3)
        assert factor_of(run.model[0].weight).steps == 0

    @pytest.mark.parametrize("load", [before_compilation, after_the_first_forward])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_what_they_say_goes_on_exactly(self, dtype: str, load: Callable[[Run, io.BytesIO], None]) -> None:
        run = Run(dtype=DTYPES[dtype], block_size=8, permutation_period=3).compile().train(0, 4)
        resumed = Run(dtype=DTYPES[dtype], block_size=16, permutation_period=3)
        load(resumed, run.save())
        with pytest.raises(
            PoetxError, match=r"pass options={'block_size': 8} to torch.compile, after poetx_compile.restore"
        ):
            resumed.train(4, 5)
        resumed.optimizer.zero_grad()
        resumed.options["block_size"] = 8
        assert poetx_compile.restore(resumed.model) == ["0.weight", "2.weight"]
        resumed.compile().train(4, LAST)
        exact(values(resumed.model), values(run.train(4, LAST).model))
        exact(state(resumed.save()), state(run.save()))

    def test_of_one_weight_keeps_the_state_of_all(self) -> None:
        saved = read(Run().compile().train(0, 2).save())
        saved["optimizer"]["state"][2]["poetx_block_size"] = 8
        file = io.BytesIO()
        torch.save(saved, file)
        run = Run().load(file).compile()
        with pytest.raises(PoetxError, match=r"'2\.weight' was trained with block_size=8"):
            run.train(2, 3)
        poetx_compile.restore(run.model)
        assert all(run.optimizer.state[run.model[layer].weight]["poetx_live"] == 0 for layer in (0, 2))

    @pytest.mark.parametrize("convert", ["prepare", "forward"])
    def test_another_storage_before_any_weight_is_rounded(self, convert: str) -> None:
        make = partial(Run, dtype=torch.bfloat16, permutation_period=3)
        run = make().compile().train(0, 4)
        resumed, file = make(storage="int8").compile(), run.save()
        resumed.load(file)
        before = values(resumed.model)
        with pytest.raises(PoetxError, match=r"trained with storage=folded, this run asks for int8"):
            if convert == "forward":
                resumed.forward()
            else:
                x = torch.randn(8, 22).bfloat16()
                poetx_compile.prepare(resumed.model, x, options=OPTIONS | resumed.options)
        exact(values(resumed.model), before)
        poetx_compile.restore(resumed.model)
        exact(values(resumed.model), before)
        resumed.options["storage"] = "folded"
        exact(values(resumed.compile().train(4, LAST).model), values(run.train(4, LAST).model))

    def test_another_storage_after_weights_were_rounded(self) -> None:
        file = Run(dtype=torch.bfloat16).compile().train(0, 2).save()
        run = Run(dtype=torch.bfloat16, storage="int8").compile()
        loss(run.compiled, 2, torch.bfloat16).backward()
        run.load(file)
        with pytest.raises(PoetxError, match=r"trained with storage=folded, this run asks for int8"):
            run.optimizer.step()

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_a_compilation_that_fails_keeps_what_was_loaded(self, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make = partial(Run, dtype=DTYPES[dtype], permutation_period=3)
        run = make().compile().train(0, 4)
        resumed = make().load(run.save()).compile()
        torch._dynamo.reset()
        with monkeypatch.context() as failing, pytest.raises(BackendCompilerFailed, match="ZeroDivisionError"):
            failing.setattr(backend, "compile_with_aot_eager", lambda *_: 1 / 0)
            resumed.forward()
        assert not factors.of_module(resumed.model)
        resumed.train(4, LAST)
        exact(values(resumed.model), values(run.train(4, LAST).model))
        exact(state(resumed.save()), state(run.save()))

    def test_an_automatic_chunk_is_the_one_that_it_stands_for(self) -> None:
        run = Run(block_size=8, chunk=8).compile().train(0, 3)
        resumed = Run(block_size=8, chunk=0).compile().load(run.save()).train(3, LAST)
        exact(values(resumed.model), values(run.train(3, LAST).model))

    def test_another_dtype_of_skews(self) -> None:
        file = Run(dtype=torch.bfloat16, skew_dtype="bfloat16").compile().train(0, 2).save()
        run = Run(dtype=torch.bfloat16).compile().load(file)
        with pytest.raises(PoetxError, match=r"trained with skew_dtype=bfloat16.*options={'skew_dtype': 'bfloat16'}"):
            run.train(2, 3)

    @pytest.mark.parametrize(
        ("option", "saved", "asked"),
        [
            ("sides", "rows", "both"),
            ("sides", "both", "columns"),
            ("updates", "given", "orthogonal"),
            ("updates", "orthogonal", "given"),
        ],
    )
    def test_other_sides_or_updates(self, option: str, saved: str, asked: str) -> None:
        file = Run(**{option: saved}).compile().train(0, 2).save()
        run = Run(**{option: asked}).compile().load(file)
        with pytest.raises(PoetxError, match=rf"trained with {option}={saved}.*options={{'{option}': '{saved}'}}"):
            run.train(2, 3)

    def test_a_checkpoint_that_does_not_name_updates_had_them_as_given(self) -> None:
        run = Run(updates="given").compile().train(0, 2)
        content = read(run.save())
        older = io.BytesIO()
        removed = [entry.pop("poetx_updates", None) for entry in content["optimizer"]["state"].values()]
        torch.save(content, older)
        assert 1 in removed
        resumed = Run(updates="given").compile().load(older).train(2, LAST)
        exact(values(resumed.model), values(run.train(2, LAST).model))

    @pytest.mark.parametrize("kind", ["AdamW", "SGD, momentum", "Adagrad", "Adafactor", "RMSprop"])
    @pytest.mark.parametrize("load", [before_compilation, before_the_first_forward, after_the_first_forward])
    def test_the_state_of_ordinary_training(self, kind: str, load: Callable[[Run, io.BytesIO], None]) -> None:
        file = Run(kind).train(0, 2).save()
        run = Run(kind)
        load(run, file)
        before = values(run.model)
        with pytest.raises(PoetxError, match=r"comes from ordinary training.*Load only the model's state_dict"):
            run.train(2, 3)
        exact(values(run.model), before)

    def test_an_optimizer_that_trained_before_the_model_was_compiled(self) -> None:
        run = Run().train(0, 2)
        with pytest.raises(PoetxError, match="comes from ordinary training"):
            run.compile().train(2, 3)

    def test_state_that_arrives_between_backward_and_step(self) -> None:
        file = Run(permutation_period=2).compile().train(0, 3).save()
        run = Run(permutation_period=2).compile()
        loss(run.compiled, 0, torch.float32).backward()
        before = values(run.model)
        run.load_optimizer(file)
        with pytest.raises(PoetxError, match=r"loaded after this step's forward.*load the optimizer's state before"):
            run.optimizer.step()
        exact(values(run.model), before)

    def test_the_residual_of_another_weight(self) -> None:
        file = Run(dtype=torch.bfloat16).compile().train(0, 3).save()
        run = Run(dtype=torch.bfloat16).compile()
        run.load_optimizer(file)
        with pytest.warns(PoetxWarning, match=r"'\d\.weight' is not the weight .* Load the model's state_dict"):
            run.forward()
        assert not factor_of(run.model[0].weight).residual.any()
