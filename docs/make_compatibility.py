"""Writes compatibility.md from the tables that the tests run: ``python docs/make_compatibility.py``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / folder) for folder in ("tests", "benchmarks")]

from limits import LIMITS  # noqa: E402
from modes import SETTINGS, STANCES  # noqa: E402
from optimizers import EIGHT_BIT, OPTIMIZERS, REFUSED  # noqa: E402
from spellings import CANONICAL, CHECKPOINTED, CONVOLUTIONS, OTHER, STACKS  # noqa: E402
from zoo import ZOO, Toy  # noqa: E402

PAGE = """\
# Compatibility

Written by `python docs/make_compatibility.py` from the tables that the tests run; a test compares the two. What the words
mean is said in [coverage.md](coverage.md).

## Models

At toy size, from their own configs, unmodified. Each is trained for some steps (`tests/models`): the loss falls, raw and
compiled module agree, singular values stay, and every parameter has its line in the report. Embeddings and heads, which stay
ordinary, are a smaller share of a model of full size.

{models}

At their published sizes, on one {device} (torch {torch}), in bfloat16, six steps on one batch, by
[`benchmarks/models.py`](../benchmarks/README.md#real-models-modelspy) ([all columns](../benchmarks/results/models-h100.csv)):

{real}

## Spellings of a linear layer

By the Gram route, which never makes the weight's gradient:

{gram}

By the dense route, which makes it, projects it and drops it:

{dense}

Stacks of matrices, by the dense route:

{stacks}

Convolutions with `include_conv=True`, by the dense route:

{convolutions}

## Ways to compile

{settings}

Also: `model.compile()` block by block, several models in threads, evaluation under `no_grad` and `inference_mode`, autocast
in bfloat16 and float16, activation checkpointing, and these stances of `torch.compiler.set_stance` for a converted model:
{stances}.

## Optimizers of `torch.optim`

{optimizers}. Refused, each by name:

{refused}

Of other packages, with states in eight bits or fewer: {eight_bit}.

## Known limits

These stay ordinary parameters, train as they did, and the report says so. Each is a test that fails when the limit falls.

{limits}
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(names: Iterable[str]) -> str:
    return ", ".join(mark(name) for name in names)


def mark(name: str) -> str:
    """A name as code if it holds any."""
    return f"`{name}`" if set("@(._=") & set(name) else name


def bullets(lines: Iterable[object]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def model(toy: Toy) -> tuple[object, ...]:
    options = ", ".join(f"{name}={value!r}" for name, value in toy.options.items())
    return toy.name, toy.library or "torch", f"{toy.coverage:.1f} %", f"`{options}`" if options else ""


def measured() -> list[dict[str, str]]:
    with (HERE.parent / "benchmarks/results/models-h100.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def real(rows: Iterable[dict[str, str]]) -> Iterator[tuple[object, ...]]:
    for row in rows:
        name = f"{row['model']} ({row['note']})" if row["note"] else row["model"]
        if not row["parameters"]:
            yield name, "", "", "", "", row["reason"].split(" Set TORCHDYNAMO")[0]
            continue
        losses = f"{float(row['first_loss']):.2f} to {float(row['last_loss']):.2f}"
        numbers = (
            f"{int(row['parameters']) / 1e6:,.0f} M",
            f"{row['coverage']} %",
            losses,
            f"{float(row['spectrum_error']):.0e}",
        )
        yield name, *numbers, row["reason"]


def page() -> str:
    rows = measured()
    headings = ("model", "parameters", "of them rotated", "loss", "singular values moved by", "what does not hold")
    return PAGE.format(
        device=rows[0]["device"],
        torch=rows[0]["torch"].partition("+")[0],
        real=table(headings, real(rows)),
        models=table(("model", "from", "numbers that are rotated", "options"), map(model, ZOO)),
        gram=code(spelling.name for spelling in CANONICAL + CHECKPOINTED),
        dense=code(spelling.name for spelling in OTHER),
        stacks=table(("product", "weight", "read as"), ((mark(s.name), s.weight, s.matrices) for s in STACKS)),
        convolutions=table(("product", "kernel", "read as"), ((mark(s.name), s.weight, s.matrices) for s in CONVOLUTIONS)),
        settings=bullets(map(mark, SETTINGS)),
        stances=code(STANCES),
        optimizers=code(OPTIMIZERS),
        refused=bullets(f"`{name}`: {reason}" for name, (_, reason) in REFUSED.items()),
        eight_bit=code(f"{package}.optim.{name}" for package, name in EIGHT_BIT),
        limits=table(("what", "what the report says"), ((mark(limit.name), limit.sentence) for limit in LIMITS)),
    )


if __name__ == "__main__":
    (HERE / "compatibility.md").write_text(page(), encoding="utf-8")
