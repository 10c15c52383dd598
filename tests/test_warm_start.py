"""A second process takes the compiled graphs of the first from torch's caches on disk, and trains the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
compiled = torch.compile(model, backend="poetx", options={"block_size": 32})
optimizer = torch.optim.SGD(model.parameters(), 0.1)
losses = []
for step in range(3):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    loss = F.mse_loss(compiled(x), x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps({"losses": losses, **counters["aot_autograd"], **counters["inductor"]}))
"""


def in_a_process(cache: Path) -> dict[str, Any]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    cold, warm = in_a_process(tmp_path), in_a_process(tmp_path)
    assert cold["autograd_cache_saved"] == 1
    assert warm["autograd_cache_hit"] == 1
    assert warm["fxgraph_cache_hit"] == cold["fxgraph_cache_miss"] == 2
    assert warm["losses"] == cold["losses"]
