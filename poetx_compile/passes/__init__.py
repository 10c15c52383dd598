"""Passes over the captured graph, in the order in which they run.

normalize -> uses -> match -> plan -> rewrite -> supply
"""

from .match import LinearMatch, Skip, SkipReason, is_named, match, unfit
from .normalize import normalize
from .plan import choose_route
from .rewrite import rewrite
from .supply import supply

__all__ = [
    "LinearMatch",
    "Skip",
    "SkipReason",
    "choose_route",
    "is_named",
    "match",
    "normalize",
    "rewrite",
    "supply",
    "unfit",
]
