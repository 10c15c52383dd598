"""For the tests of those who use this package: does conversion keep what it must on *my* model?

:func:`check_equivalence` checks one model; :mod:`.strategies` draws random ones for Hypothesis, which it imports.
"""

from .check import check_equivalence
from .explicit import explicit_weight

__all__ = ["check_equivalence", "explicit_weight"]
