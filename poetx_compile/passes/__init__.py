"""Passes over the captured graph, in the order in which they run.

normalize -> uses -> match -> plan -> rewrite -> supply
"""

from .match import LinearMatch, Skip, SkipReason, all_names, is_named, match, unfit
from .normalize import bias_of, normalize, outputs_of
from .plan import choose_route
from .rewrite import rewrite
from .supply import supply

__all__ = [
    "LinearMatch",
    "Skip",
    "SkipReason",
    "all_names",
    "bias_of",
    "choose_route",
    "is_named",
    "match",
    "normalize",
    "outputs_of",
    "rewrite",
    "supply",
    "unfit",
]
