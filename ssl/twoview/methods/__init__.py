"""What the papers describe, one file a method."""

from twoview.methods.base import Method, Step
from twoview.methods.simclr import SimCLR

__all__ = ["Method", "SimCLR", "Step"]
