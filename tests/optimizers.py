"""Every optimizer of ``torch.optim``: those that train rotations, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn, optim
from torch.optim import Optimizer

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD, momentum": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1),
    "SGD, Nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam, amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.02, lr_decay=0.1, initial_accumulator_value=0.01),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "RMSprop": partial(optim.RMSprop, lr=0.005),
    "RMSprop, centered": partial(optim.RMSprop, lr=0.005, centered=True, momentum=0.5),
    "Rprop": partial(optim.Rprop, lr=0.005),
    "ASGD": partial(optim.ASGD, lr=0.05, t0=2),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
}
EIGHT_BIT = {
    ("torchao", "AdamW8bit"): "exp_avg",
    ("torchao", "Adam8bit"): "exp_avg",
    ("torchao", "AdamW4bit"): "exp_avg",
    ("torchao", "AdamWFp8"): "exp_avg",
    ("bitsandbytes", "AdamW8bit"): "state1",
    ("bitsandbytes", "Lion8bit"): "state1",
}
"""From other packages: those that quantise their states, and the name of their first moment."""

FUSED = ("SGD", "SGD, momentum", "SGD, Nesterov", "Adam", "Adam, amsgrad", "AdamW", "Adagrad")
"""Those of them that torch can fuse on a CPU."""

REFUSED: dict[str, tuple[Callable[[nn.Sequential], Optimizer], str]] = {
    "LBFGS": (lambda model: optim.LBFGS(model.parameters()), "it evaluates the model at trial points within one step"),
    "SparseAdam": (lambda model: optim.SparseAdam(list(model.parameters())), "it takes sparse gradients only"),
    "Muon": (lambda model: optim.Muon([model[0].weight, model[2].weight]), "it orthogonalises matrices"),
}
"""What cannot train rotations, and the reason that is told."""
