"""Command line. Only this subpackage imports Hydra and OmegaConf."""

from twoview.cli.main import main

__all__ = ["main"]
