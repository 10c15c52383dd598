"""Ways to compile a model, and to switch compilation while it trains."""

from __future__ import annotations

from typing import Any

DEBUG: dict[str, Any] = {"inner": "aot_eager", "block_size": 16, "chunk": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "mode='reduce-overhead'": {"mode": "reduce-overhead"},
    "mode='max-autotune'": {"mode": "max-autotune"},
    "mode='max-autotune-no-cudagraphs'": {"mode": "max-autotune-no-cudagraphs"},
    "fullgraph=True": {"fullgraph": True, "options": DEBUG},
    "dynamic=True": {"dynamic": True, "options": DEBUG},
    "dynamic=False": {"dynamic": False, "options": DEBUG},
    "fullgraph=True, dynamic=True, through Inductor": {"fullgraph": True, "dynamic": True},
    "options of Inductor": {"options": {"epilogue_fusion": False, "block_size": 16, "chunk": 4}},
    "options={'inner': 'aot_eager'}": {"options": DEBUG},
}
"""Arguments of ``torch.compile`` beside the backend."""

STANCES = ("default", "force_eager", "eager_on_recompile", "eager_then_compile", "fail_on_recompile")
"""What ``torch.compiler.set_stance`` may be told once a model is converted."""
