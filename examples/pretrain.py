"""Pretrain an unmodified Llama on the bytes of a folder of text, with ``torch.compile(model, backend="poetx")``.

    python examples/pretrain.py                      a small model and Python's own source: minutes on two cores
    python examples/pretrain.py --compare skewmuon,adamw    the same by rotations with SkewMuon, and by ordinary training; one plot
    python examples/pretrain.py --config 350m --corpus ~/books --out runs/books

The output folder receives metrics.csv, loss.png, run.json, and for each method a checkpoint and the trained model in
Hugging Face's format. ``--resume`` goes on from the checkpoints as if nothing had happened. ``--watch`` records what the
rotations do: rotations.csv and rotations.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from corpus import START, VOCABULARY, Corpus, decode, encode
from plot import draw
from record import (
    Row,
    forget_peak_memory,
    load_checkpoint,
    machine,
    peak_memory,
    save_checkpoint,
    tokens_per_second,
    write_csv,
)
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rotations import Watch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

import poetx_compile
from poetx_compile.optim import SkewMuon

LOG_EVERY = 10
VALIDATION_BATCHES = 8
PROMPTS = ("import ", "def read(", "class Error")
SAMPLE_TOKENS = 160

console = Console()


@dataclass(frozen=True)
class Size:
    """The dimensions of a Llama, and how it trains unless told otherwise."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    steps: int = 1000
    batch: int = 32
    seq: int = 1024
    lr: float = 2e-3
    adamw_lr: float = 1e-3
    skewmuon_lr: float = 8e-3
    block_size: int = 256


SKEWMUON_SCALE = 0.25
"""Rotations want a lower rate than embedding and head: docs/convergence.md."""

SIZES = {
    "tiny": Size(128, 384, 4, 4, 4, steps=300, batch=16, seq=128, lr=4e-3, adamw_lr=4e-3, skewmuon_lr=1.6e-2, block_size=64),
    "60m": Size(512, 1280, 8, 8, 8, skewmuon_lr=1.6e-2),
    "130m": Size(768, 2048, 12, 12, 12),
    "350m": Size(1024, 2736, 24, 16, 16),
    "1b": Size(2048, 5632, 24, 16, 16),
    "3b": Size(2560, 7168, 32, 20, 20),
    "8b": Size(4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, and so must be the same when it is resumed."""

    method: str
    config: str
    corpus: str
    dtype: str
    seed: int
    steps: int
    batch: int
    seq: int
    lr: float
    block_size: int | None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    disable_progress_bar()
    try:
        corpus = Corpus(args.corpus)
    except ValueError as error:
        sys.exit(f"pretrain: {error}")
    available = min(len(corpus.train), len(corpus.validation))
    if args.seq > available:
        sys.exit(f"pretrain: --seq {args.seq} is longer than the corpus, one part of which has {available} bytes")
    runs = plan(args, corpus)
    if args.resume and not any((args.out / f"{run.method}.pt").exists() for run in runs):
        sys.exit(f"pretrain: --resume finds no checkpoint in {args.out}")
    if args.out.is_file():
        sys.exit(f"pretrain: --out {args.out} is a file, and must be a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for run in runs:
        rows += train(run, args, corpus, earlier=rows)
        draw(args.out / "loss.png", rows, f"Llama {args.config}, {args.batch} × {args.seq} bytes a step")
    summarize(args, rows)


def plan(args: argparse.Namespace, corpus: Corpus) -> list[Settings]:
    first = Settings(
        method="poetx",
        config=args.config,
        corpus=corpus.fingerprint,
        dtype=args.dtype,
        seed=args.seed,
        steps=args.steps,
        batch=args.batch,
        seq=args.seq,
        lr=args.lr,
        block_size=args.block_size,
    )
    others = {
        "skewmuon": dataclasses.replace(first, method="skewmuon", lr=args.skewmuon_lr),
        "adamw": dataclasses.replace(first, method="adamw", lr=args.adamw_lr, block_size=None),
    }
    return [first, *(others[name] for name in args.compare)]


def build(settings: Settings, device: str) -> PreTrainedModel:
    """A Llama as its authors wrote it, with the random weights that belong to the seed.

    Rotations keep the size of every weight, so it must be right from the start: 1/√hidden makes the output of a layer as
    large as its input. At the smaller sizes ordinary training gains from it too, over the default of 0.02.
    """
    size = SIZES[settings.config]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(settings.seq, 2048),
        initializer_range=size.hidden**-0.5,
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=START,
    )
    torch.manual_seed(settings.seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))


def train(settings: Settings, args: argparse.Namespace, corpus: Corpus, earlier: list[Row]) -> list[Row]:
    """Train one model to the last step, from its initial weights or from its checkpoint."""
    forget_peak_memory(args.device)
    model = build(settings, args.device)
    if settings.method == "adamw":
        compiled = torch.compile(model, backend=args.inner)
    else:
        scale = SKEWMUON_SCALE if settings.method == "skewmuon" else 1.0
        options = {"block_size": settings.block_size, "scale": scale, "inner": args.inner}
        compiled = torch.compile(model, backend="poetx", options=options)
    kind = SkewMuon if settings.method == "skewmuon" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=settings.lr)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=settings.steps // 10, num_training_steps=settings.steps, min_lr_rate=0.1
    )
    path = args.out / f"{settings.method}.pt"
    rows: list[Row] = []
    if args.resume and path.exists():
        content, rows = load_checkpoint(path)
        check_same(settings, content["settings"], path)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])

    done, seconds = (rows[-1].step, rows[-1].seconds) if rows else (0, 0.0)
    if done == settings.steps:
        console.print(f"{settings.method}: finished before")
        return rows

    validation = corpus.validation_batches(VALIDATION_BATCHES, settings.batch, settings.seq)
    losses: list[Tensor] = []
    watch = Watch(model, args.out, done) if args.watch and settings.method == "poetx" else None
    with progress_bar() as progress:
        bar = progress.add_task(settings.method, total=settings.steps, completed=done, status="compiling")
        started = time.perf_counter()
        for step in range(done, settings.steps):
            batch = corpus.batch(settings.seed, step, settings.batch, settings.seq).to(args.device)
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            done = step + 1
            progress.update(bar, completed=done)
            losses.append(loss.detach())
            milestone = done % args.eval_every == 0 or done == settings.steps
            if done % LOG_EVERY and not milestone:
                continue
            train_loss = float(torch.stack(losses).mean())
            losses.clear()
            seconds += time.perf_counter() - started
            if watch is not None:
                watch.note(done, is_milestone=milestone)
            val_loss = evaluate(model, validation) if milestone else None
            tokens = done * settings.batch * settings.seq
            rows.append(Row(settings.method, done, tokens, train_loss, val_loss, seconds, peak_memory(args.device)))
            progress.update(bar, status=status(rows))
            if milestone:
                console.print(f"{settings.method} step {done}: training {train_loss:.3f}, held-out files {val_loss:.3f}")
                write_csv(args.out / "metrics.csv", earlier + rows)
                content = {
                    "settings": dataclasses.asdict(settings),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                save_checkpoint(path, content, rows)
                if watch is not None:
                    watch.save()
            started = time.perf_counter()

    if settings.method != "adamw":
        poetx_compile.report(model)
    model.save_pretrained(args.out / settings.method)
    show_samples(model, settings)
    return rows


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """The mean loss of the raw module, whose weights are the trained ones at any time."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss for batch in (batch.to(model.device) for batch in batches)]
    model.train()
    return float(torch.stack(losses).mean())


def show_samples(model: PreTrainedModel, settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    model.eval()
    for prompt in PROMPTS:
        tokens = torch.tensor([encode(prompt)], device=model.device)
        text = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=0.7, max_new_tokens=SAMPLE_TOKENS
        )
        console.print(Panel(Text(decode(text[0].tolist()[1:])), title=f"{settings.method}: a sample", title_align="left"))


def check_same(now: Settings, before: dict[str, Any], path: Path) -> None:
    for name, value in dataclasses.asdict(now).items():
        if before[name] != value:
            sys.exit(f"pretrain: {path} was trained with {name} {before[name]}, and cannot be resumed with {name} {value}")


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def status(rows: Sequence[Row]) -> str:
    rate = tokens_per_second(rows[-2:])
    return f"loss {rows[-1].train_loss:.3f}, {rate:,.0f} tokens/s, peak memory {rows[-1].peak_memory / 1e9:.2f} GB"


def summarize(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Print the outcome of each method, and write run.json."""
    table = Table(
        "method", "loss on held-out files", "bits per byte", "seconds", "tokens/s", title="Result", title_justify="left"
    )
    results = {}
    for method, part in groupby(rows, key=lambda row: row.method):
        of_method = list(part)
        last, rate = of_method[-1], tokens_per_second(of_method)
        assert last.val_loss is not None
        table.add_row(
            method, f"{last.val_loss:.4f}", f"{last.val_loss / math.log(2):.4f}", f"{last.seconds:.0f}", f"{rate:,.0f}"
        )
        results[method] = dataclasses.asdict(last) | {"tokens_per_second": rate}
    console.print(table)
    arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = {"date": date, **machine(args.device), "arguments": arguments, "results": results}
    (args.out / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    console.print(f"{args.out}: metrics.csv, loss.png, run.json, checkpoints and trained models")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and fill in what depends on the device and the size."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", choices=SIZES, help="size of the model (default: 130m on a GPU, tiny elsewhere)")
    add("--corpus", type=Path, help="folder of text files (default: the standard library's modules)")
    add("--compare", type=methods, default=[], metavar="skewmuon,adamw", help="train the same model again by these too")
    add("--out", type=Path, help="output folder (default: runs/CONFIG)")
    add("--watch", action="store_true", help="record what the rotations do: rotations.csv and rotations.png; takes time")
    add("--resume", action="store_true", help="go on from the checkpoints in the output folder")
    for name in ("steps", "batch", "seq"):
        add(f"--{name}", type=positive, help="(default: depends on the size)")
    add("--lr", type=float, help="learning rate of poetx (default: depends on the size)")
    add("--adamw-lr", type=float, help="learning rate of the comparison (default: depends on the size)")
    add("--skewmuon-lr", type=float, help="learning rate with SkewMuon (default: depends on the size)")
    add("--block-size", type=positive, help="channels that rotate together (default: depends on the size)")
    add("--seed", type=int, default=0, help="of initial weights and batches (default: 0)")
    add("--eval-every", type=positive, help="steps between validations, each with a checkpoint (default: a tenth of all)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: bfloat16 on a GPU)")
    add("--inner", choices=("inductor", "aot_eager"), default="inductor", help="inner compiler, for debugging")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    args.config = args.config or ("130m" if on_gpu else "tiny")
    defaults = dataclasses.asdict(SIZES[args.config])
    defaults |= {"dtype": "bfloat16" if on_gpu else "float32", "out": Path("runs", args.config)}
    for name, value in vars(args).items():
        if value is None and name in defaults:
            setattr(args, name, defaults[name])
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    return args


def methods(text: str) -> list[str]:
    names = text.split(",")
    if not {*names} <= {"skewmuon", "adamw"} or len({*names}) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not skewmuon, adamw or both")
    return names


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


if __name__ == "__main__":
    main()
