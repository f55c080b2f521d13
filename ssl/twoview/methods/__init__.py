"""Self-supervised methods, one file per method."""

from twoview.methods.base import Encoded, Method, Step
from twoview.methods.moco import MoCo
from twoview.methods.moco_v3 import MoCoV3
from twoview.methods.nnclr import NNCLR
from twoview.methods.simclr import SimCLR
from twoview.methods.supcon import SupCon

__all__ = ["NNCLR", "Encoded", "Method", "MoCo", "MoCoV3", "SimCLR", "Step", "SupCon"]
