"""Evaluation of features: hyperparameters are chosen on held-out training labels; test labels are read once."""

from twoview.evaluation.finetune import FineTuning
from twoview.evaluation.settings import MEASURES, EvaluationSettings

__all__ = ["MEASURES", "EvaluationSettings", "FineTuning"]
