"""Numbers that say how much of a generator's quality survived, each with its uncertainty and the network behind it.

`evaluate` draws with two pipelines from the same noise and scores the pictures. One metric per file; the networks
that turn pictures into features are files of their own, because a Fréchet distance over one network is not comparable
with one over another.
"""

from qgen.eval.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from qgen.eval.evaluate import evaluate
from qgen.eval.extractors import MissingWeights
from qgen.eval.generate import generate
from qgen.eval.resume import generate_into
from qgen.eval.scores import Score, Scores

__all__ = [
    "Interval",
    "MissingWeights",
    "Score",
    "Scores",
    "bootstrap_difference",
    "bootstrap_mean",
    "evaluate",
    "generate",
    "generate_into",
]
