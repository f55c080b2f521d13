"""The command line. Hydra and OmegaConf are imported in this package only."""

from twoview.cli.main import main

__all__ = ["main"]
