"""Lightning callbacks, one per file."""

from twoview.training.callbacks.feature_check import FeatureCheck
from twoview.training.callbacks.keep_memory import KeepMemory
from twoview.training.callbacks.progress_bar import ProgressBar
from twoview.training.callbacks.save_checkpoints import SaveCheckpoints
from twoview.training.callbacks.signals import SignalHandler
from twoview.training.callbacks.time_limit import TimeLimit
from twoview.training.callbacks.training_logger import TrainingLogger

__all__ = [
    "FeatureCheck",
    "KeepMemory",
    "ProgressBar",
    "SaveCheckpoints",
    "SignalHandler",
    "TimeLimit",
    "TrainingLogger",
]
