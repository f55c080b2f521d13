"""Choice of the run folder for ``resume=`` and under torchrun, and hash of a configuration."""

import hashlib
import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from twoview.cli.overrides import CONF, check_overrides, quoted, value_of, without
from twoview.cli.stored import read_overrides, require_plain_files
from twoview.errors import require
from twoview.files import read_json

log = logging.getLogger(__name__)

# Top-level keys that are not part of the identity of a configuration.
_NOT_IDENTIFYING = ("task", "logger", "resume", "rerun", "hydra")

# Groups whose knobs determine the weights, and those knobs that do not: images are compared by their fingerprint.
_DETERMINING = ("method", "backbone", "head", "augment", "optimizer", "scheduler", "data")
_LOADING = [
    f"data.{knob}" for knob in ("root", "eval_root", "download", "memory", "cache", "num_workers", "max_broken")
]


def resolve_resume(overrides: list[str], sweep: bool) -> list[str]:
    """Replace ``resume=`` by the overrides that continue a run in its folder.

    ``resume=RUN_DIR`` continues the run in this folder with its stored overrides. ``resume=auto`` continues the newest
    unfinished run of the same configuration.

    Args:
        overrides: overrides of the command line, quoted; these take precedence over stored overrides.
        sweep: whether the command is a sweep.

    Returns:
        The overrides of the run to continue; ``overrides`` without ``resume=`` if there is no run to continue.

    Raises:
        UserError: if the folder holds no run, or ``resume=`` is given to a sweep.
    """
    where = value_of("resume", overrides)
    if where is None:
        return overrides
    require(not sweep, f"resume={where}: a sweep (-m) resumes its unfinished runs by itself; leave it out")
    given = [o for o in overrides if not o.startswith("resume=")]
    if where == "auto":
        folder = _newest_unfinished(given)
        if folder is None:
            print("resume=auto: there is no unfinished run of this configuration; starting a new one")
            return given
        require_plain_files(folder)
    else:
        folder = Path(where).expanduser()
        keys = {o.partition("=")[0] for o in given}
        given = [*(o for o in read_overrides(folder) if o.partition("=")[0] not in keys), *given]
    return [*given, quoted(f"resume.run={folder}"), quoted(f"hydra.run.dir={folder}")]


def common_folder(overrides: list[str], sweep: bool) -> list[str]:
    """Under torchrun, return the override of the run folder that rank 0 chooses for all ranks.

    The name of the default folder is the current time, which differs between processes.

    Args:
        overrides: overrides of the command line.
        sweep: whether the command is a sweep.

    Returns:
        A list with ``hydra.run.dir=FOLDER``; an empty list without torchrun or if the folder is given.

    Raises:
        UserError: if a sweep is started under torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return []
    require(not sweep, "-m: a sweep starts its processes itself; leave torchrun out and give trainer.devices=N")
    if value_of("hydra.run.dir", overrides) is not None:
        return []
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"twoview/folder/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "0":
        store.set(key, f"{datetime.now():runs/%Y-%m-%d/%H-%M-%S-%f}")
    return [f"hydra.run.dir={store.get(key).decode()}"]


def _newest_unfinished(overrides: list[str]) -> Path | None:
    texts = check_overrides(overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        wanted = _identifying(hydra.compose("config", texts))
    runs = sorted(Path("runs").glob("*/*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    unfinished = (file for file in runs if not _is_finished(file.parent))
    return next((file.parent for file in unfinished if _stored(file) == wanted), None)


def _is_finished(folder: Path) -> bool:
    """Whether a run has a report, and its evaluation was not interrupted."""
    try:
        return not read_json(folder / "report.json").get("incomplete")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _stored(file: Path) -> Any:
    """The identifying part of a stored configuration; None if the file cannot be read."""
    try:
        return _identifying(OmegaConf.load(file))
    except Exception as error:  # errors of the YAML parser have no common class that is public
        log.warning("resume=auto: %s cannot be read (%s)", file, type(error).__name__)
        return None


def _identifying(cfg: Any) -> Any:
    """Return the part of a configuration that identifies a run, with interpolations resolved."""
    return OmegaConf.to_container(without(cfg, *_NOT_IDENTIFYING), resolve=True)


def training_knobs(cfg: Any) -> dict[str, Any]:
    """Knobs that determine the weights of a run, by their dotted names, as plain values."""
    groups: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(_DETERMINING)), resolve=True)
    knobs = {f"{group}.{knob}": value for group, node in groups.items() for knob, value in node.items()}
    return {name: value for name, value in knobs.items() if name not in _LOADING} | {"trainer.clip": cfg.trainer.clip}


def _config_hash(*, _root_: Any) -> str:
    return hashlib.blake2b(json.dumps(_identifying(_root_), sort_keys=True).encode(), digest_size=8).hexdigest()


# Registered at import, so that the resolver is known in every process of a launcher.
OmegaConf.register_new_resolver("config_hash", _config_hash, replace=True)
