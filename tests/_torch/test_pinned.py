"""Every module of private torch API has tests of its own here: an upgrade that breaks a piece of it fails by name."""

from __future__ import annotations

import importlib
import pkgutil

from poetx_compile import _torch

PINNED = {
    "compilers": [
        "activation_budget",
        "compile_with_aot_eager",
        "compile_with_inductor",
        "global_state_check",
        "graph_break",
        "inductor_modes",
        "inductor_option_names",
        "inductor_option_type",
        "is_tracing",
        "partition_with_inductor",
        "run_once",
    ],
    "data_parallel": [
        "_data_parallel",
        "_kind",
        "_living",
        "_noting",
        "active_ddp",
        "after_ddp_join",
        "before_fsdp_constructor",
        "count_in_ddp_pieces",
        "distributed_wrapper",
        "within_ddp_constructor",
    ],
    "graphs": [
        "_fake",
        "_fake_input",
        "add_input",
        "bodies",
        "checkpointed",
        "context_function",
        "copy_graph",
        "fake_beside",
        "fake_inputs",
        "functorch_nodes",
        "live_inputs",
        "source_name",
    ],
    "optimizers": [
        "explain_failed_loads",
        "live_optimizers",
        "on_optimizer_state_loaded",
        "run_first_after_step",
        "steps_running",
    ],
    "parameters": [
        "_is_for_us",
        "gradient_hooks",
        "hide_from_fakes",
        "modules_with",
        "notice_changed",
        "own_grad",
        "own_operations",
        "replace_grad_attribute",
        "set_own_grad",
        "trace_as_parameter",
        "under_functorch",
    ],
    "tensors": ["fake_tensors", "is_fake", "map_tensors", "storage_of", "tensors_in"],
}


def functions(module: str) -> set[str]:
    name = f"{_torch.__name__}.{module}"
    found = {key for key, thing in vars(importlib.import_module(name)).items() if getattr(thing, "__module__", "") == name}
    return {key for key in found if not key.startswith("__resume_at")}  # left by Dynamo


def test_every_function_is_pinned() -> None:
    modules = [module.name for module in pkgutil.iter_modules(_torch.__path__)]
    assert {module: functions(module) for module in modules} == {name: set(pinned) for name, pinned in PINNED.items()}
