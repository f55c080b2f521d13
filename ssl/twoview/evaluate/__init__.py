"""What frozen features are worth; every choice is made on held-out training labels, test labels are read once."""

from twoview.evaluate.features import extract
from twoview.evaluate.measure import Evidence, measure
from twoview.evaluate.probes import few_label_splits, score, split_holdout
from twoview.evaluate.protocol import PARTS, Protocol

__all__ = ["PARTS", "Evidence", "Protocol", "extract", "few_label_splits", "measure", "score", "split_holdout"]
