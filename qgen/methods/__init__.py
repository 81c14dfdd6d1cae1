"""Methods: each takes a Draft and returns a better one. One per file; a recipe lists them in the order in which they refine."""

from qgen.methods.base import Method, Stats, refine
from qgen.recipe import methods

__all__ = ["Method", "Stats", "methods", "refine"]
