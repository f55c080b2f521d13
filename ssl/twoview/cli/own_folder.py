"""The option ``--config-dir=DIR``: a folder of the user's own configurations, such as ``method/NAME.yaml``."""

import argparse
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from twoview.errors import require


class OwnFolder(SearchPathPlugin):
    """Adds the folder to those in which Hydra looks for configurations, also when overrides are checked."""

    path = ""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder."""
        search_path.append("command-line", f"file://{self.path}")


def take_own_folder(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Find the option in the command line, and let Hydra look for configurations in its folder.

    Args:
        arguments: the command line.

    Returns:
        The option with an absolute path, as a list of none or one argument, for the command lines of further processes;
        and the other arguments.

    Raises:
        UserError: if there is no such folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, others = parser.parse_known_args(arguments)
    if known.config_dir is None:
        return [], arguments
    path = Path(known.config_dir).expanduser().resolve()
    message = "there is no such folder; give one that holds files such as method/NAME.yaml"
    require(path.is_dir(), f"--config-dir={known.config_dir}: {message}")
    OwnFolder.path = str(path)
    Plugins.instance().register(OwnFolder)
    return [f"--config-dir={path}"], others
