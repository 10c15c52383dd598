"""A trained model leaves as any PyTorch model does, and is read where poetx is not installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import network, rotating, train, values
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

exact = partial(torch.testing.assert_close, rtol=0, atol=0)

X = torch.randn(5, 22, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def trained(request: pytest.FixtureRequest) -> nn.Module:
    model = network(request.param)
    compiled = rotating(model)
    train(compiled, torch.optim.AdamW(model.parameters(), lr=0.01), range(3))
    assert not torch.equal(values(model)[0], values(network(request.param))[0])
    return model


def without_poetx(script: str, *arguments: object) -> None:
    """Run a script in a process of its own where ``import poetx_compile`` fails."""
    head = """
        import sys
        sys.modules["poetx_compile"] = None
        import torch
        path, out = sys.argv[1:3]
    """
    tail = """
        assert not any(name.startswith("poetx_compile.") for name in sys.modules)
        torch.save(result, out)
    """
    source = "\n".join(map(textwrap.dedent, (head, script, tail)))
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def read(path: Path) -> Tensor:
    return torch.load(path, weights_only=True)


NETWORK = """
    from torch import nn
    model = nn.Sequential(nn.Linear(22, 32), nn.Tanh(), nn.Linear(32, 20, bias=False), nn.LayerNorm(20))
    model.load_state_dict(state)
    model.to(next(iter(state.values())).dtype)
    model.load_state_dict(state)
    x = torch.randn(5, 22, generator=torch.Generator().manual_seed(1))
    result = model(x.to(model[0].weight.dtype)).detach()
"""


@pytest.mark.parametrize("kind", ["state_dict", "safetensors"])
def test_weights(kind: str, trained: nn.Module, tmp_path: Path) -> None:
    path, out = tmp_path / "model", tmp_path / "out.pt"
    if kind == "state_dict":
        torch.save(trained.state_dict(), path)
        load = "state = torch.load(path, weights_only=True)"
    else:
        save_file(trained.state_dict(), path)
        load = "from safetensors.torch import load_file\nstate = load_file(path)"
    without_poetx("\n".join([load, textwrap.dedent(NETWORK)]), path, out)
    exact(read(out), trained(X.to(trained[0].weight.dtype)).detach())


def test_exported_program(trained: nn.Module, tmp_path: Path) -> None:
    x = X.to(trained[0].weight.dtype)
    torch.export.save(torch.export.export(trained.eval(), (x,)), tmp_path / "model.pt2")
    script = """
        program = torch.export.load(path).module()
        x = torch.randn(5, 22, generator=torch.Generator().manual_seed(1))
        result = program(x.to(next(program.parameters()).dtype)).detach()
    """
    without_poetx(script, tmp_path / "model.pt2", tmp_path / "out.pt")
    exact(read(tmp_path / "out.pt"), trained(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", ["folded", "int8"])
def test_exported_while_gradients_are_there(storage: str, dtype: torch.dtype) -> None:
    model, x = network(dtype), X.to(dtype)
    optimizer = torch.optim.SGD(model.parameters())
    compiled = rotating(model, storage=storage)
    compiled(x).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    exact(torch.export.export(model, (x,)).module()(x), model(x))
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients))
    optimizer.zero_grad()


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = network(torch.float32)
    train(rotating(model), torch.optim.AdamW(model.parameters(), lr=0.01), range(3))
    torch.onnx.export(model.eval(), (X,), tmp_path / "model.onnx", dynamo=True)
    onnx.checker.check_model(tmp_path / "model.onnx")
    script = """
        import onnx
        from onnx.reference import ReferenceEvaluator
        evaluator = ReferenceEvaluator(path)
        x = torch.randn(5, 22, generator=torch.Generator().manual_seed(1))
        result = torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])
    """
    without_poetx(script, tmp_path / "model.onnx", tmp_path / "out.pt")
    torch.testing.assert_close(read(tmp_path / "out.pt"), model(X).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_save_pretrained(in_place: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=32**-0.5)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    start = values(model)
    options = {"inner": "aot_eager", "block_size": 16}
    if in_place:
        model.compile(backend="poetx", options=options)
    compiled = model if in_place else torch.compile(model, backend="poetx", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        compiled(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(now, before) for now, before in zip(values(model), start))
    compiled.save_pretrained(tmp_path / "model")
    script = """
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            result = model(torch.tensor([[1, 5, 9, 2, 7]])).logits
    """
    without_poetx(script, tmp_path / "model", tmp_path / "out.pt")
    with torch.no_grad():
        exact(read(tmp_path / "out.pt"), LlamaForCausalLM.forward(model.eval(), TOKENS).logits)
