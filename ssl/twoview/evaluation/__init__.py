"""Evaluation of frozen features: choices on held-out training labels, scores on test labels that are read once."""

from twoview.evaluation.finetune import FineTuning
from twoview.evaluation.settings import MEASURES, EvaluationSettings

__all__ = ["MEASURES", "EvaluationSettings", "FineTuning"]
