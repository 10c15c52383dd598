"""Passes over the captured graph, in the order in which they run.

normalize -> uses -> match -> plan -> rewrite
"""

from .match import LinearMatch, Skip, SkipReason, match, unfit
from .normalize import normalize
from .plan import choose_route
from .rewrite import rewrite

__all__ = ["LinearMatch", "Skip", "SkipReason", "choose_route", "match", "normalize", "rewrite", "unfit"]
