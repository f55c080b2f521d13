"""Pretraining with Lightning. No other subpackage uses Lightning."""

from twoview.training.settings import Recipe, RunSettings, TrainerSettings

__all__ = ["Recipe", "RunSettings", "TrainerSettings"]
