"""One run of the convergence benchmark, in the process that this is: ``convergence.py`` starts it."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from convergence_data import Tokens
from convergence_recipes import SIZES, Place, Recipe
from convergence_rows import Key, Line, Row
from rows import facts
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_with_min_lr_schedule_with_warmup


@dataclass(frozen=True)
class Case:
    """A run, and how this process takes part in it.

    Attributes:
        state: folder of checkpoints and of the lines so far.
        deadline: by ``time.time``; the run stops after it, to be continued.
        jobs: processes on the device, at most.
    """

    key: Key
    corpus: str
    state: str
    device: str
    deadline: float
    jobs: int = 1
    log_every: int = 20
    eval_every: int = 100
    eval_batch: int = 32
    save_seconds: float = 240
    compiler: str = "inductor"
    official: str | None = None

    @classmethod
    def read(cls, text: str) -> Case:
        plain = json.loads(text)
        return cls(**{**plain, "key": Key(**plain["key"])})

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def lines_path(self) -> Path:
        """Where the run keeps its lines: also what tells that it has begun."""
        name = hashlib.sha256(self.key.label.encode()).hexdigest()[:16]
        return Path(self.state, f"{name}.json")

    @property
    def checkpoint_path(self) -> Path:
        return self.lines_path.with_suffix(".pt")

    def lines(self) -> list[Line]:
        """What the run has written so far."""
        return read_lines(self.lines_path)


class Run:
    """A recipe on its way, from the start or from its checkpoint."""

    def __init__(self, case: Case) -> None:
        self.case, self.key = case, case.key
        self.device = torch.device(case.device)
        self.recipe = Recipe.parse(self.key.recipe)
        self.tokens = Tokens(Path(case.corpus), self.key.seq, self.device)
        official = None if case.official is None else Path(case.official)
        size = SIZES[self.key.size]
        if self.tokens.vocabulary > size.vocabulary:
            raise ValueError(f"the corpus has {self.tokens.vocabulary} different tokens, the model takes {size.vocabulary}")
        self.trained = self.recipe.make(Place(size, self.key.seq, self.device, self.key.seed, case.compiler, official))
        self.schedulers = [self._scheduler(optimizer) for optimizer in self.trained.optimizers]
        self.machine = facts(self.device)
        self.lines: list[Line] = []
        self.step = 0
        self.seconds = 0.0
        if case.checkpoint_path.exists():
            self._load()

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, self.recipe["warmup"], self.key.steps, min_lr_rate=self.recipe["floor"]
        )

    def train(self) -> str:
        """Go on to the last step, or until the deadline; gives how it ended, or nothing if it is to be continued."""
        case, key, trained = self.case, self.key, self.trained
        losses: list[Tensor] = []
        end, saved = "", time.time()
        started = time.perf_counter()
        while not end:
            rate = self.schedulers[-1].get_last_lr()[0]
            losses.append(self._advance())
            self.step += 1
            is_last = self.step == key.steps
            is_milestone = self.step % case.eval_every == 0 or is_last
            if self.step % case.log_every and not is_milestone:
                continue
            train_loss = float(torch.stack(losses).mean())
            span = time.perf_counter() - started
            self.seconds += span
            end = "diverged" if not math.isfinite(train_loss) else "finished" if is_last else ""
            measured = is_milestone and end != "diverged"
            val_loss, by_kind = self.validate() if measured else (None, {})
            if val_loss is not None and not math.isfinite(val_loss):
                end, val_loss, by_kind = "diverged", None, {}
            seen = self.step * key.batch * key.seq
            row = Row(
                step=self.step,
                tokens=seen,
                epochs=seen / self.tokens.train.numel(),
                train_loss=train_loss,
                val_loss=val_loss,
                lr=rate,
                seconds=self.seconds,
                tokens_per_s=len(losses) * key.batch * key.seq / span,
                peak_bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
                jobs=case.jobs,
                end=end,
                by_kind=by_kind,
            )
            losses.clear()
            self.lines.append(Line(key, row, self.machine))
            is_over = not end and time.time() > case.deadline
            if is_over or (not end and time.time() - saved > case.save_seconds):
                self._save()
                saved = time.time()
            write_lines(case.lines_path, self.lines)
            if is_over:
                return ""
            trained.module.train()
            started = time.perf_counter()
        case.checkpoint_path.unlink(missing_ok=True)
        return end

    def _advance(self) -> Tensor:
        """One step of training; the device is not waited for."""
        trained = self.trained
        batch = self.tokens.batch(self.key.seed, self.step, self.key.batch)
        with self.recipe.autocast(self.device):
            loss: Tensor = trained.forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained.module.parameters(), self.recipe["clip"])
        for optimizer, scheduler in zip(trained.optimizers, self.schedulers):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        trained.after_step(self.step + 1)
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> tuple[float, dict[str, float]]:
        """The mean loss over all validation windows, and over those of each kind, without the compiler."""
        module = self.trained.module.eval()
        losses = []
        for batch in self.tokens.validation_batches(self.case.eval_batch):
            with self.recipe.autocast(self.device):
                logits = module(input_ids=batch, use_cache=False).logits
            each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
            losses.append(each.view(len(batch), -1).mean(1))
        return self.tokens.by_kind(torch.cat(losses))

    def _save(self) -> None:
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.trained.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.trained.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "random": _random_state(self.device),
            "lines": json.dumps([line.plain() for line in self.lines]),
        }
        temporary = self.case.checkpoint_path.with_suffix(".tmp")
        torch.save(content, temporary)
        temporary.replace(self.case.checkpoint_path)

    def _load(self) -> None:
        content = torch.load(self.case.checkpoint_path, map_location=self.device, weights_only=True)
        self.step, self.seconds = content["step"], content["seconds"]
        self.trained.module.load_state_dict(content["model"])
        for kind, things in (("optimizers", self.trained.optimizers), ("schedulers", self.schedulers)):
            for thing, state in zip(things, content[kind]):
                thing.load_state_dict(state)
        self.trained.resumed(self.step)
        _set_random_state(content["random"], self.device)
        self.lines = [Line.read(plain) for plain in json.loads(content["lines"])]


def read_lines(path: Path) -> list[Line]:
    return [Line.read(plain) for plain in json.loads(path.read_text())] if path.exists() else []


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps([line.plain() for line in lines]))
    temporary.replace(path)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu(), device)


def main(text: str) -> Any:
    return Run(Case.read(text)).train()


if __name__ == "__main__":
    main(sys.argv[1])
