"""The questions of docs/convergence.md: each is a list of recipes that differ in one thing, most informative first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """A question, and the recipes that answer it."""

    question: str
    recipes: tuple[str, ...]


def over(spec: str, option: str, *values: object) -> tuple[str, ...]:
    return tuple(f"{spec}:{option}={value}" for value in values)


WIDE = "poetx-muon:lr=1.6e-2:scale=0.566:adjust=original:init=row-normalised"
"""SkewMuon with an angle for each step that is the same for blocks of every width."""

EVEN = "poetx:lr=1.6e-2:beta2=0.95:init=row-normalised"

WHOLE = "lr=8e-3:beta2=0.95:init=row-normalised:block_size=2048:gains=rows"
"""Blocks as wide as the matrices of 130M, at half the rate of 60M."""

FREE = "poetx-muon:lr=1.6e-2:scale=0.125:init=row-normalised:block_size=512:dtype=autocast"

SUITES = {
    "core": Suite(
        "Rotations against ordinary training, at the rates that are our defaults or nearest to them",
        (
            "poetx:updates=given:lr=2e-3",
            "adamw:dtype=autocast:lr=1e-3",
            "muon:dtype=autocast:lr=2e-3",
            "poetx-muon:lr=2e-3",
            "poetx:updates=given:dtype=autocast:lr=2e-3",
            "adamw:dtype=autocast:lr=2e-3",
            "adamw:lr=2e-3",
        ),
    ),
    "rates": Suite(
        "The learning rate of each method",
        (
            *over("adamw:dtype=autocast", "lr", 2e-3, 1e-3, 4e-3, 5e-4),
            *over("poetx:updates=given", "lr", 2e-3, 4e-3, 1e-3, 8e-3),
            *over("muon:dtype=autocast", "lr", 2e-3, 4e-3, 1e-3, 8e-3),
            *over("adamw", "lr", 2e-3, 1e-3, 4e-3),
            *over("sgd:dtype=autocast", "lr", 0.1, 0.3, 1.0),
        ),
    ),
    "updates": Suite(
        "Steps that turn all channels of a block by nearly one angle, by default, and steps as AdamW writes them",
        (
            *over("poetx", "lr", 4e-3, 2e-3),
            *over("poetx:updates=given", "lr", 4e-3, 2e-3),
            *over(EVEN, "scale", 0.25, 0.177, 0.125),
            *over(f"{EVEN}:block_size=512", "scale", 0.177, 0.125),
            "poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.125",
            "poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.0625:block_size=512:init=row-normalised",
            f"{EVEN}:block_size=1280:gains=rows:scale=0.112",
        ),
    ),
    "muon": Suite(
        "Orthogonalised updates of rotations (SkewMuon): rate and momentum",
        (
            *over("poetx-muon", "lr", 2e-3, 4e-3, 1e-3, 8e-3),
            *over("poetx-muon:lr=8e-3:scale=0.5", "init", "row-normalised", "keep"),
            "poetx-muon:lr=4e-3:init=row-normalised",
            *over("poetx-muon:lr=1.6e-2:scale=0.25", "init", "row-normalised", "keep"),
            "poetx-muon:lr=1.6e-2:scale=0.177:init=row-normalised",
            "poetx-muon:lr=3.2e-2:scale=0.125:init=row-normalised",
            *over("poetx-muon:lr=8e-3:scale=0.5", "gain", 2, 0.5),
            "poetx-muon:lr=1.6e-2:scale=0.25:init=row-normalised:floor=0",
            "poetx-muon:lr=2e-3:nesterov=False",
            "poetx-muon:lr=2e-3:momentum=0.9",
            "poetx-muon:lr=2e-3:scale=2.0",
            "poetx-muon:dtype=autocast:lr=2e-3",
        ),
    ),
    "baselines": Suite(
        "What else a tuned AdamW may take: momentum of its second moment, initial weights, weight decay",
        (
            "adamw:dtype=autocast:lr=2e-3:std=0.02",
            *over("adamw:dtype=autocast:beta2=0.95", "lr", 2e-3, 4e-3, 1e-3),
            "adamw:dtype=autocast:lr=2e-3:weight_decay=0.1",
            *over("adamw:dtype=autocast:std=0.02:beta2=0.95:weight_decay=0.1", "lr", 2e-3, 1e-3, 4e-3),
            "muon:dtype=autocast:lr=2e-3:std=0.02",
        ),
    ),
    "ratio": Suite(
        "What AdamW and Muon make of a rate of their own for the matrices of the layers",
        (
            *over("adamw:dtype=autocast:beta2=0.95:lr=8e-3", "ratio", 0.25, 0.125),
            *over("adamw:dtype=autocast:beta2=0.95:lr=1.6e-2", "ratio", 0.125, 0.25),
            *over("adamw:dtype=autocast:beta2=0.95:lr=3.2e-2", "ratio", 0.0625, 0.125),
            "adamw:dtype=autocast:beta2=0.95:lr=3e-3",
            *over("muon:dtype=autocast:lr=1.6e-2", "ratio", 0.5, 0.25, 1),
            "muon:dtype=autocast:lr=1.6e-2:ratio=0.5:beta2=0.95",
        ),
    ),
    "official": Suite("The authors' code", ("official:lr=1e-3", "official:lr=2e-3:ratio=2")),
    "scale": Suite(
        "The scale of rotations against the rate of all else",
        (
            *(f"poetx:updates=given:lr={rate}:scale={scale}" for rate in (4e-3, 2e-3) for scale in (1.0, 0.5, 0.25, 2.0)),
            *over("poetx:updates=given:beta2=0.95", "lr", 2e-3, 4e-3),
            *over("poetx:updates=given:beta2=0.95:lr=4e-3", "scale", 0.5, 0.25),
            *over("poetx:updates=given:beta2=0.95:lr=8e-3", "scale", 0.25, 0.125, 0.5),
            "poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.125",
            "poetx:updates=given:beta2=0.95:lr=8e-3:scale=0.25:init=row-normalised",
        ),
    ),
    "block": Suite(
        "The block size",
        (
            *over("poetx:updates=given:lr=2e-3", "block_size", 128, 512, 256),
            *over("poetx-muon:lr=4e-3", "block_size", 128, 512, 256),
            *over("poetx-muon:lr=1.6e-2:init=row-normalised:block_size=512", "scale", 0.125, 0.0884, 0.18),
            *over("poetx-muon:lr=1.6e-2:init=row-normalised", "scale", 0.25, 0.177, 0.125),
            f"{WIDE}:block_size=1280",
            f"{WIDE}:beta2=0.95:block_size=1280",
            "poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.125",
            *over("poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.0625:block_size=512", "init", "row-normalised", "keep"),
        ),
    ),
    "precision": Suite(
        "The dtype of weights and of skew parameters, and the bits that a residual keeps",
        (
            "poetx:updates=given:lr=2e-3",
            "poetx:updates=given:dtype=autocast:lr=2e-3",
            "poetx:updates=given:lr=2e-3:skew_dtype=bfloat16",
            "poetx:updates=given:lr=2e-3:residual_bits=0",
            "poetx:updates=given:lr=2e-3:residual_bits=4",
            *over("poetx-muon:lr=1.6e-2:scale=0.25:init=row-normalised", "dtype", "autocast", "bf16"),
            *over("poetx-muon:lr=1.6e-2:scale=0.0884:init=row-normalised:block_size=512", "dtype", "autocast", "bf16"),
        ),
    ),
    "init": Suite(
        "Initial weights: their size, and rows of norm 1",
        (
            *over("poetx:updates=given:init=row-normalised", "lr", 2e-3, 4e-3),
            "poetx:updates=given:lr=4e-3",
            "poetx:updates=given:lr=2e-3:gain=2",
            "poetx:updates=given:lr=2e-3:gain=0.5",
            "poetx:updates=given:lr=2e-3:std=0.02",
            "poetx:updates=given:lr=2e-3:std=0.02:init=row-normalised",
            "poetx:updates=given:lr=2e-3",
        ),
    ),
    "spectrum": Suite(
        "What a fixed spectrum costs: singular values of other shapes, and trained factors of each layer's outputs",
        (
            *over("poetx-muon:lr=1.6e-2:scale=0.125:block_size=512", "spectrum", "linear", "square"),
            *over("poetx-muon:lr=1.6e-2:scale=0.125:block_size=512:init=row-normalised", "dtype", "bf16"),
            *over(f"{WIDE}:beta2=0.95:block_size=1280", "gains", "rows", "none"),
            *over("poetx-muon:lr=1.6e-2:scale=0.25", "spectrum", "flat", "random"),
            *over("poetx-muon:lr=1.6e-2:scale=0.25:init=row-normalised", "gains", "rows", "layer", "none"),
            "poetx-muon:lr=1.6e-2:scale=0.25:spectrum=flat:gains=rows",
            "poetx-muon:lr=1.6e-2:scale=0.35:init=row-normalised:gains=rows",
            f"{FREE}:gains=rows",
            *over("poetx:updates=given:lr=1.6e-2:scale=0.125:beta2=0.95", "spectrum", "flat", "random"),
            *over("muon:dtype=autocast:lr=1.6e-2:ratio=0.5", "spectrum", "flat", "random"),
        ),
    ),
    "period": Suite(
        "New permutations, and what the moments keep of the old",
        (
            *over("poetx:updates=given:lr=2e-3:permutation_period=200", "moments", "transport", "reset", "second", "keep"),
            *over("poetx:updates=given:lr=2e-3:permutation_period=25", "moments", "transport", "second", "reset"),
            *over("poetx-muon:lr=4e-3:permutation_period=25", "moments", "reset", "keep"),
            "poetx-muon:lr=4e-3",
            "poetx:updates=given:lr=2e-3",
        ),
    ),
    "storage": Suite(
        "Lean storage against weights folded at each step",
        (
            *over("poetx:updates=given:beta2=0.95:lr=8e-3:scale=0.25", "storage", "int8", "bf16-lean"),
            "poetx:updates=given:beta2=0.95:lr=8e-3:scale=0.25",
        ),
    ),
    "sides": Suite(
        "One side alone", (*over("poetx:updates=given:lr=2e-3", "sides", "rows", "columns"), "poetx:updates=given:lr=2e-3")
    ),
    "decay": Suite(
        "The last learning rate",
        (
            *over("poetx:updates=given:lr=2e-3", "floor", 0.1, 0.0),
            *over(f"{FREE}:gains=rows", "floor", 0.1, 0.0),
            f"{FREE}:gains=rows:beta2=0.95",
        ),
    ),
    "final": Suite(
        "The best of each method",
        (
            *over(f"{WIDE}:beta2=0.95:gains=rows", "block_size", 1280, 2048),
            *over(f"{WIDE}:beta2=0.95", "block_size", 1280, 2048),
            "muon:dtype=autocast:lr=1.6e-2:ratio=0.5:beta2=0.95",
            "adamw:dtype=autocast:beta2=0.95:lr=3.2e-2:ratio=0.0625",
            "adamw:dtype=autocast:beta2=0.95:lr=1.6e-2:ratio=0.125",
            "adamw:dtype=autocast:beta2=0.95:lr=8e-3:ratio=0.25",
            f"{EVEN}:block_size=1280:gains=rows:scale=0.112",
            f"{EVEN}:block_size=512:scale=0.177",
            f"{EVEN}:scale=0.25",
            "poetx:lr=4e-3",
            "poetx:updates=given:beta2=0.95:lr=1.6e-2:scale=0.0625:block_size=512:init=row-normalised",
            "muon:dtype=autocast:beta2=0.95:lr=8e-3:ratio=0.5",
            f"poetx:{WHOLE}:scale=0.177",
            f"poetx-muon:{WHOLE}:scale=0.8:adjust=original",
        ),
    ),
    "long": Suite(
        "Longer training, and the scale that it asks for",
        (
            "adamw:dtype=autocast:beta2=0.95:lr=1.6e-2:ratio=0.125",
            *over(f"{EVEN}:block_size=1280:gains=rows", "scale", 0.0316, 0.112),
            *over(f"{EVEN}:block_size=512", "scale", 0.05, 0.177),
            f"{EVEN}:block_size=512:gains=rows:scale=0.0354",
            *over(EVEN, "scale", 0.25, 0.0707),
        ),
    ),
}
