from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "poetx", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("poetx")
torch.set_num_threads(1)  # matrices here are tiny: threads that wait for each other take most of the time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test compiles anew, from the same seed; what benchmarks of the authors' code set in Dynamo is put back."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = torch._dynamo.config
    with config.patch({name: getattr(config, name) for name in ("automatic_dynamic_shapes", "recompile_limit")}):
        yield
    torch._dynamo.reset()
