"""The overrides in a run folder, which may come from anyone and are checked before they are used."""

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from twoview.errors import UserError, require

OVERRIDES = ".hydra/overrides.yaml"  # in the run folder
_MAX_BYTES = 100_000
# Read but not used: what is asked for with each command, and where files outside of the run folder are written.
_NOT_REPEATED = ("resume", "rerun", "logger", "eval.cache", "data.cache", "data.download")


def dump_overrides(overrides: list[str]) -> str:
    """Content of the file :data:`OVERRIDES`, without the ``++`` that Hydra needs before some keys.

    A list in YAML with one override a line, however long it is.
    """
    lines = [f"- {json.dumps(text.removeprefix('++'), ensure_ascii=False)}\n" for text in overrides]
    return "".join(lines) or "[]\n"


def read_overrides(folder: Path) -> list[str]:
    """Overrides of an earlier run. Only knobs and choices of groups are accepted.

    Args:
        folder: run folder.

    Returns:
        Overrides for pretraining, without ``resume``, ``rerun``, ``logger``, ``eval.cache`` and ``data.cache``. Data
        sets are not downloaded again.

    Raises:
        UserError: the folder is not that of a run, holds a link or a special file, or an override is not accepted.
    """
    file = folder / OVERRIDES
    require(file.is_file(), f"resume={folder}: this is not the folder of a run; give one such as runs/DATE/TIME")
    require_plain_files(folder)
    require(file.stat().st_size < _MAX_BYTES, f"resume={folder}: {OVERRIDES} is larger than {_MAX_BYTES:,} bytes")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [] if lines == ["[]"] else [_unquoted(line) for line in lines]
    except (OSError, ValueError) as error:
        message = f"{OVERRIDES} cannot be read ({str(error)[:80]}); each of its lines is - KEY=VALUE"
        raise UserError(f"resume={folder}: {message}") from error
    require(lines, f"resume={folder}: {OVERRIDES} is empty")
    accepted = []
    for override in found:
        advice = "only knobs of pretraining are taken from a folder; remove the line, or give it on the command line"
        require(_is_plain(override), f"resume={folder}: {OVERRIDES} holds {override[:80]!r}; {advice}")
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_REPEATED):
            accepted.append(override)
    if any(override in ("data=cifar10", "data=cifar100", "data=stl10") for override in accepted):
        accepted.append("data.download=false")
    return accepted


def require_plain_files(folder: Path) -> None:
    """Refuse a run folder with a link or special file in it: what is written through a link would be outside.

    Raises:
        UserError: naming the file.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(parent, name)).st_mode
            plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            message = f"{os.path.join(parent, name)} is a link or a special file; a run folder holds plain files only"
            require(plain, f"resume={folder}: {message}")


def _unquoted(line: str) -> str:
    """The override in a line. No YAML parser is used: aliases could expand a small file to more than the memory."""
    if not line.startswith("- "):
        raise ValueError(line[:40])
    text = line[2:]
    if text.startswith('"'):
        return str(json.loads(text))
    return text[1:-1].replace("''", "'") if text.startswith("'") else text


def _is_plain(text: str) -> bool:
    """Whether an override sets one knob or chooses one group of pretraining, and nothing in it is executed."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    key = override.key_or_group
    sets = not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_sweep_override())
    named = re.fullmatch(r"[A-Za-z]\w*([./][A-Za-z]\w*)*", key) and re.split("[./]", key)[0] != "hydra"
    # References to other knobs are harmless; resolvers such as ${oc.env:HOME} read what the folder should not see.
    references = "${" in re.sub(r"\$\{[\w.]+\}", "", text)
    if not sets or not named or override.package or references or not text.isprintable():
        return False
    value = override.value()
    return (key != "task" or value == "pretrain") and not _instantiates(value)


def _instantiates(value: Any) -> bool:
    """Whether a value holds a key such as ``_target_``, which names a function to call."""
    if isinstance(value, Mapping):
        return any(str(key).startswith("_") or _instantiates(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_instantiates, value))
