"""What frozen features are worth: a linear probe and k nearest neighbours, chosen on held-out training labels."""

from twoview.evaluate.features import extract
from twoview.evaluate.probes import Protocol, judge, split_holdout

__all__ = ["Protocol", "extract", "judge", "split_holdout"]
