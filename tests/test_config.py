"""Settings: what is accepted, and what a user is told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from poetx_compile import PoetxConfig
from poetx_compile.config import HEADS, INNER, ROUTES, split_options
from poetx_compile.errors import PoetxError, PoetxWarning

WRONG = [
    ("block_size", 256.0, "'block_size' must be int, not 256.0"),
    ("block_size", True, "'block_size' must be int, not True"),
    ("block_size", "256", "'block_size' must be int, not '256'"),
    ("block_size", 250, "block_size 250 is impossible: .* nearest are 248 and 256, or set chunk=1"),
    ("block_size", 0, "block_size 0 is impossible: .* nearest is 32, or set chunk=1"),
    ("block_size", -32, "block_size -32 is impossible"),
    ("chunk", -1, "'chunk' must be 1 or more, or 0 for one that fits, not -1"),
    ("chunk", 2.0, "'chunk' must be int"),
    ("chunk", 24, "multiple of chunk .24.* nearest are 240 and 264"),
    ("scale", 0.0, "'scale' must be positive and finite, not 0.0"),
    ("scale", -1, "'scale' must be positive and finite"),
    ("scale", float("inf"), "'scale' must be positive and finite"),
    ("scale", float("nan"), "'scale' must be positive and finite"),
    ("scale", "1", "'scale' must be float, not '1'"),
    ("permutation_period", -1, "'permutation_period' must be 0 or more, not -1"),
    ("permutation_period", 1.5, "'permutation_period' must be int"),
    ("seed", 0.5, "'seed' must be int"),
    ("seed", None, "'seed' must be int"),
    ("residual_bits", 6, "'residual_bits' must be one of 8, 4, 0, not 6"),
    ("residual_bits", "8", "'residual_bits' must be int"),
    ("updates", "even", "'updates' must be one of orthogonal, given, not 'even'"),
    ("sides", "left", "'sides' must be one of both, rows, columns, not 'left'"),
    ("init", "rows", "'init' must be one of keep, row-normalised, not 'rows'"),
    ("moments", "drop", "'moments' must be one of reset, keep, second, transport, not 'drop'"),
    ("storage", "int4", "'storage' must be one of folded, int8, bf16-lean, not 'int4'"),
    ("skew_dtype", "float16", "'skew_dtype' must be one of float32, bfloat16, not 'float16'"),
    ("activation_memory_budget", 1.5, "'activation_memory_budget' must be from 0 to 1, not 1.5"),
    ("activation_memory_budget", -0.1, "'activation_memory_budget' must be from 0 to 1"),
    ("activation_memory_budget", float("nan"), "'activation_memory_budget' must be from 0 to 1"),
    ("activation_memory_budget", "0.5", "'activation_memory_budget' must be float"),
    ("memory", "all", "'memory' must be 'auto', or gigabytes such as 24.0 .0 for no limit., not 'all'"),
    ("memory", -1.0, "'memory' must be 'auto', or gigabytes"),
    ("memory", float("inf"), "'memory' must be 'auto', or gigabytes"),
    ("memory", float("nan"), "'memory' must be 'auto', or gigabytes"),
    ("memory", True, "'memory' must be 'auto', or gigabytes"),
    ("memory", None, "'memory' must be 'auto', or gigabytes"),
    ("exclude", "gate", "'exclude' must be a list of names, not 'gate'"),
    ("exclude", ["gate", 3], "'exclude' must be a list of names"),
    ("exclude", None, "'exclude' must be a list of names, not None"),
    ("heads", 5, "'heads' must be a list of names, not 5"),
    ("include_conv", 1, "'include_conv' must be bool, not 1"),
    ("route", "fast", "'route' must be one of auto, gram, dense, not 'fast'"),
    ("route", None, "'route' must be str"),
    ("precision", "fp32", "'precision' must be one of auto, ieee, tf32x3, tf32, not 'fp32'"),
    ("inner", "eager", "'inner' must be one of inductor, aot_eager, not 'eager'"),
]


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, *_ in WRONG} == {field.name for field in dataclasses.fields(PoetxConfig)}


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(PoetxError, match=message):
        PoetxConfig(**{name: value})
    with pytest.raises(PoetxError, match=message):
        split_options({name: value}, None)


def test_settings_cannot_change_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PoetxConfig().scale = 2.0  # type: ignore[misc]


def test_defaults() -> None:
    config, patches = split_options(None, None)
    assert config == PoetxConfig() == split_options({}, "default")[0]
    assert (config.block_size, config.chunk, config.scale, config.permutation_period) == (256, 0, 1.0, 0)
    assert (config.exclude, config.heads, config.route, config.precision) == ((), HEADS, "auto", "auto")
    assert config.inner == "inductor"
    assert patches == {}


def test_a_block_size_that_no_automatic_chunk_divides() -> None:
    with pytest.raises(PoetxError, match="the nearest are 96 and 104"):
        PoetxConfig(block_size=100)


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_multiple_of_the_chunk_is_a_block_size(chunk: int, count: int) -> None:
    assume(chunk * count > 1)
    assert PoetxConfig(block_size=chunk * count, chunk=chunk).block_size == chunk * count


@given(st.integers(1, 40), st.integers(-5, 200))
def test_the_nearest_block_sizes_that_a_message_names_are_possible(chunk: int, block_size: int) -> None:
    assume(block_size < 2 or block_size % chunk)
    with pytest.raises(PoetxError, match="the nearest ") as raised:
        PoetxConfig(block_size=block_size, chunk=chunk)
    named = str(raised.value).split("the nearest ")[1].removesuffix(", or set chunk=1")
    sizes = [int(size) for size in named.removeprefix("is ").removeprefix("are ").split(" and ")]
    assert [PoetxConfig(block_size=size, chunk=chunk).block_size for size in sizes] == sorted(set(sizes))


def test_chunk_1_is_not_advised_to_who_set_it() -> None:
    with pytest.raises(PoetxError, match=r"the nearest is 2$"):
        PoetxConfig(block_size=1, chunk=1)


def test_a_whole_number_is_a_scale() -> None:
    scale = PoetxConfig(scale=2).scale
    assert isinstance(scale, float)
    assert scale == 2.0


def test_memory_is_gigabytes_or_auto() -> None:
    assert [PoetxConfig(memory=value).memory for value in (24, 24.0, "auto", 0)] == [24.0, 24.0, "auto", 0.0]


@pytest.mark.parametrize("kind", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_names_may_come_as_any_iterable(kind: Callable[[list[str]], Any]) -> None:
    assert PoetxConfig(exclude=kind(["gate", "a.*"])).exclude == ("gate", "a.*")
    assert PoetxConfig(heads=kind(["score"])).heads == ("score",)


@pytest.mark.parametrize(("name", "choices"), [("route", ROUTES), ("inner", INNER)])
def test_every_choice_is_accepted(name: str, choices: tuple[str, ...]) -> None:
    assert [getattr(PoetxConfig(**{name: choice}), name) for choice in choices] == list(choices)


# --- Sorting out the options of torch.compile ------------------------------------------------------------------------


def test_options_are_parted_into_ours_and_inductors() -> None:
    config, patches = split_options({"block_size": 64, "max_autotune": True, "triton.cudagraphs": False}, None)
    assert config == PoetxConfig(block_size=64)
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}


def test_inductors_options_may_be_spelled_with_dashes() -> None:
    assert split_options({"max-autotune": True}, None)[1] == {"max_autotune": True}


def test_a_mode_stands_for_inductors_options() -> None:
    assert split_options(None, "max-autotune")[1] == torch._inductor.list_mode_options("max-autotune")


def test_an_option_wins_over_the_mode() -> None:
    assert split_options({"max_autotune": False}, "max-autotune")[1]["max_autotune"] is False


@pytest.mark.parametrize("mode", torch._inductor.list_mode_options())
def test_every_mode_of_inductor_passes(mode: str) -> None:
    assert split_options(None, mode)[1] == torch._inductor.list_mode_options(mode)


@pytest.mark.parametrize("mode", ["fastest", "max_autotune", 3])
def test_an_unknown_mode_is_answered_with_the_known_ones(mode: Any) -> None:
    with pytest.raises(PoetxError, match=f"unknown mode {mode!r}; torch.compile knows default, .*max-autotune"):
        split_options(None, mode)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("blocksize", "block_size"),
        ("block-size", "block_size"),
        ("permutation_perod", "permutation_period"),
        ("max_autotun", "max_autotune"),
    ],
)
def test_a_typo_is_answered_with_the_closest_option(typo: str, meant: str) -> None:
    with pytest.raises(PoetxError, match=f"unknown option '{typo}'; did you mean '{meant}'"):
        split_options({typo: 1}, None)


@pytest.mark.parametrize("name", ["qqq", 7])
def test_an_option_like_no_other_is_answered_with_ours(name: Any) -> None:
    with pytest.raises(
        PoetxError, match=f"unknown option {name!r}; poetx knows activation_memory_budget, block_size, chunk"
    ):
        split_options({name: 1}, None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_autotune", "yes", "bool"),
        ("max_autotune", 1, "bool"),
        ("triton.cudagraphs", None, "bool"),
        ("max-fusion-size", 1.5, "int"),
    ],
)
def test_a_wrong_value_of_an_inductor_option_is_refused_as_torch_does(name: str, value: Any, expected: str) -> None:
    with pytest.raises(PoetxError, match=f"Inductor's option '{name}' must be {expected}, not {value!r}"):
        split_options({name: value}, None)
    with pytest.raises(RuntimeError, match="Unexpected type"):
        torch.compile(nn.Linear(2, 2), options={name: value})


def test_torch_compile_passes_options_and_mode_on() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"PoetxError: .*did you mean 'block_size'"):
        torch.compile(nn.Linear(2, 2), backend="poetx", options={"block_siz": 1})(torch.ones(2))
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"PoetxError: .*unknown mode 'fastest'"):
        torch.compile(nn.Linear(2, 2), backend="poetx", mode="fastest")(torch.ones(2))


def test_inductors_options_that_aot_eager_leaves_out_are_named() -> None:
    with pytest.warns(
        PoetxWarning, match=r"inner='aot_eager' takes no Inductor options; left out: max_autotune, shape_padding"
    ):
        config, _ = split_options({"inner": "aot_eager", "max_autotune": True, "shape-padding": False}, None)
    assert config.inner == "aot_eager"
    split_options({"inner": "aot_eager", "block_size": 64}, "default")
    split_options({"inner": "inductor", "max_autotune": True}, None)


@pytest.mark.parametrize(("block_size", "chunk"), [(16, 0), (32, 0), (64, 64)])
def test_permutations_that_mix_nothing_are_told(block_size: int, chunk: int) -> None:
    with pytest.warns(PoetxWarning, match=f"which are whole blocks of block_size={block_size}: .* Pass a smaller chunk"):
        PoetxConfig(block_size=block_size, chunk=chunk, permutation_period=5)
    PoetxConfig(block_size=block_size, chunk=chunk)
    PoetxConfig(block_size=block_size, chunk=8, permutation_period=5)
