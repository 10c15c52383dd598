from __future__ import annotations

import platform

import pytest
import torch

from poetx_compile import machine


def test_facts_are_flat_and_the_same_names_everywhere() -> None:
    facts = machine.facts("cpu")
    assert facts["device"] == f"{platform.machine()} CPU"
    assert (facts["torch"], facts["python"], facts["driver"]) == (torch.__version__, platform.python_version(), None)
    assert facts["poetx_compile"] and facts["threads"] == str(torch.get_num_threads())
    assert all(value is None or type(value) is str for value in facts.values())


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert machine.version("no-such-package") is None
    assert torch.__version__.startswith(str(machine.version("torch")))  # a local build adds to it


def test_a_command_that_fails_says_nothing() -> None:
    assert machine._output("no-such-command") is None
    assert machine._output("false") is None
    assert machine._output("echo", "580.1") == "580.1"


@pytest.mark.gpu
def test_a_gpu_has_a_name_and_a_driver() -> None:
    facts = machine.facts("cuda")
    assert facts["device"] == torch.cuda.get_device_name()
    assert facts["driver"] and facts["cuda"] == torch.version.cuda
