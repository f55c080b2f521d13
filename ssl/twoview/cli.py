"""The command line, and the only place that knows Hydra: composition, mistakes in one sentence, the final table."""

import difflib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twoview import sweeps
from twoview.errors import Interrupted, UserError

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
# In the wheel beside this file, in a clone at its root.
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf"

# Knobs that the evaluation of a checkpoint does not have, or takes from the checkpoint.
_PRETRAIN_ONLY = ("data.image_size", "data.store_size", "data.channels")

# Knobs whose null means something although they have a value by default.
_MAY_BE_NULL = ("trainer.max_epochs", "trainer.max_time", "select_by", "eval.cache")

# Launchers and sweepers that are plugins of Hydra, and the extras that bring them.
_PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "optuna": "optuna"}

# The plugin would look for the worst, and for another set of trials each time, so that finished ones are not found.
_OPTUNA = ("hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0")

_mistakes: list[str] = []  # of the one run that is no sweep


def main() -> None:
    """Run the command line; exits with 2 for a mistake of the user's, with 1 if a run of a sweep failed."""
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    overrides = [quoted(a) for a in sys.argv[1:] if not a.startswith("-")]
    sweep = any(a in ("-m", "--multirun", "hydra.mode=MULTIRUN") for a in sys.argv[1:])
    try:
        overrides = _resumed(overrides, sweep)
        # Other flags ask Hydra for something else than a run: help, the configuration, shell completion.
        if sweep or not flags:
            sys.argv[1:] = [*flags, *check_overrides(overrides, sweep), *_common_folder(overrides, sweep)]
        if "hydra/sweeper=optuna" in overrides:
            given = {o.partition("=")[0] for o in overrides}
            sys.argv += [o for o in _OPTUNA if not {o.partition("=")[0], "hydra/sweeper/sampler"} & given]
        if sweep:
            root = next(
                (o.partition("=")[2].strip("'") for o in overrides if o.startswith("hydra.sweep.dir=")), "sweeps"
            )
            folder = Path(root).resolve() / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
            os.environ[sweeps.VARIABLE] = str(folder)
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job)()
        finally:
            failed = sweep and folder.is_dir() and sweeps.summarize(folder)
        if _mistakes:
            raise UserError(_mistakes[0])
    except UserError as error:
        print(f"twoview: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("twoview: stopped", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(1)


def _job(cfg: DictConfig) -> float | None:
    """One run; what it returns is what a sweeper optimises."""
    job, name, figure, mistake = HydraConfig.get(), cfg.get("select_by"), None, None
    sweep = job.mode == RunMode.MULTIRUN
    try:
        report = _ranks() if sweep and cfg.get("trainer", {}).get("devices", 1) > 1 else _run(cfg, sweep)
        figures = report.get("figures", {})
        name = name or next(iter(figures), None)
        figure = figures.get(name)
        figure = figure if figure is not None and math.isfinite(figure) else None
    except Interrupted as stop:
        print(f"twoview: {stop}", file=sys.stderr)
        # A sweep ends here too. A rank that Lightning started must not fail: rank 0 would be killed for it.
        started = int(os.environ.get("LOCAL_RANK", "0")) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        raise SystemExit(0 if started else stop.code) from None
    except Exception as error:
        mistake = next((str(e) for e in _causes(error) if isinstance(e, UserError)), None)
        if os.environ.get("HYDRA_FULL_ERROR") or (mistake is None and not sweep):
            raise
        if sweep:  # the other runs go on
            log.error("%s: %s", " ".join(job.overrides.task), mistake or "failed", exc_info=mistake is None)
            mistake = mistake or f"{type(error).__name__}: {error}"
        else:
            _mistakes.append(str(mistake))
    if sweep:
        folder = os.path.relpath(job.runtime.output_dir)
        sweeps.record(job.job.num, job.overrides.task, folder, str(name), figure, mistake)
    return figure


def _ranks() -> Mapping[str, Any]:
    """A run of several processes inside a sweep, as a command of its own: its ranks would replay the sweep."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    given = [*job.overrides.task, quoted(f"resume.run={folder}"), quoted(f"hydra.run.dir={folder}")]
    process = subprocess.Popen([sys.executable, "-m", "twoview", *given], stderr=subprocess.PIPE, text=True)
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        process.terminate()  # whatever was asked of us: Ctrl-C reaches the ranks too, and twice would be too often

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        words = process.communicate()[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(words, end="", file=sys.stderr)
    if asked or process.returncode in (130, 143):
        raise SystemExit(process.returncode if process.returncode > 0 else 128 + asked[0])
    if process.returncode != 0:
        said = [line.removeprefix("twoview: ") for line in words.splitlines() if line.startswith("twoview: ")]
        raise UserError(
            said[-1] if said else f"its processes ended with code {process.returncode}; see {folder}/run.log"
        )
    report: Mapping[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def _common_folder(overrides: list[str], sweep: bool) -> list[str]:
    """Under torchrun every rank reads the clock for itself, so rank 0's folder is handed to the others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return []
    if sweep:
        raise UserError("-m: a sweep starts its processes itself; leave torchrun out and give trainer.devices=N")
    if any(o.startswith("hydra.run.dir=") for o in overrides):
        return []
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"twoview/folder/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "0":
        store.set(key, f"{datetime.now():runs/%Y-%m-%d/%H-%M-%S-%f}")
    return [f"hydra.run.dir={store.get(key).decode()}"]


def _run(cfg: DictConfig, sweep: bool) -> Mapping[str, Any]:
    from twoview.runs import SELECTABLE  # only now: a mistyped knob should not wait for torch

    select_by = cfg.get("select_by")
    if select_by not in (None, *SELECTABLE):
        raise UserError(f"select_by={select_by}: choose one of {', '.join(SELECTABLE)}")
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: give a whole number from 0 to {2**32 - 1}")
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "task"])
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if rank == "0":
        folder = Path(HydraConfig.get().runtime.output_dir)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(plain, resolve=True))
    else:  # one process of several speaks; the others write to run.log
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
            else:
                handler.setLevel(logging.ERROR)
    parts = {}
    for name, node in cfg.task.items():
        if not name.startswith("_"):
            try:
                parts[name] = hydra.utils.instantiate(node, _convert_="all") if OmegaConf.is_config(node) else node
            except HydraException as error:
                if any(isinstance(e, UserError) for e in _causes(error)):
                    raise
                # A part that cannot be built of the knobs it was given, or an extra that is not installed.
                raise UserError(f"{name}: {str(error.__cause__ or error).splitlines()[0]}") from error
    if sweep and "resume" in parts:
        parts["resume"] = True  # a sweep that is started again goes on
    result = hydra.utils.get_method(cfg.task._target_)(**parts)
    if not isinstance(result, Mapping):
        return {}
    if "results" in result or "runs" in result:
        _print_report(result)
    return result


def _resumed(overrides: list[str], sweep: bool) -> list[str]:
    """With ``resume=RUN_DIR``, the overrides of that run under the given ones, in its folder."""
    where = next((o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("resume=")), None)
    if where is None:
        return overrides
    if sweep:
        raise UserError(f"resume={where}: a sweep (-m) that is started again goes on by itself; leave it out")
    given = [o for o in overrides if not o.startswith("resume=")]
    if where == "auto":
        folder = _newest_unfinished(given)
        if folder is None:
            print("resume=auto: there is no unfinished run of this configuration; a new one begins")
            return given
    else:
        folder = Path(where).expanduser()
        stored = folder / ".hydra" / "overrides.yaml"
        if not stored.is_file():
            raise UserError(f"resume={where}: there is no run; give the folder of one")
        keys = {o.partition("=")[0] for o in given} | {"resume.run", "hydra.run.dir"}
        before = [str(o) for o in OmegaConf.to_container(OmegaConf.load(stored))]  # type: ignore[union-attr]
        given = [*(o for o in before if o.partition("=")[0] not in keys), *given]
    return [*given, quoted(f"resume.run={folder}"), quoted(f"hydra.run.dir={folder}")]


def _newest_unfinished(overrides: list[str]) -> Path | None:
    texts = check_overrides(overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        wanted = _plain(hydra.compose("config", texts))
    runs = sorted(Path("runs").glob("*/*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    unfinished = (file for file in runs if not (file.parent / "report.json").exists())
    return next((file.parent for file in unfinished if _plain(OmegaConf.load(file)) == wanted), None)


def _plain(cfg: Any) -> Any:
    """What makes a run what it is: not its folder, nor what it goes on from."""
    apart = ("task", "logger", "resume", "rerun", "hydra")
    kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in apart])
    return OmegaConf.to_container(kept, resolve=True)


def _config_hash(*, _root_: Any) -> str:
    return hashlib.blake2b(json.dumps(_plain(_root_), sort_keys=True).encode(), digest_size=8).hexdigest()


# At import, so that every process has it which is handed a job.
OmegaConf.register_new_resolver("config_hash", _config_hash, replace=True)


def _print_report(report: Mapping[str, Any]) -> None:
    from twoview.report import comparison_tables, show, tables

    shown = comparison_tables(report) if report["task"] == "compare" else tables(report)
    for table in shown if report["task"] in ("evaluate", "compare") else shown[:1]:
        if table.title not in ("Classes", "Invariance"):  # too long for a terminal; the pages hold all
            show(table)
    folder = os.path.relpath(report["run_dir"])
    pages = ("report.html", "report.md", "report.json")
    print("report: " + ", ".join(f"{folder}/{name}" for name in pages if (Path(folder) / name).exists()))
    if report["task"] == "pretrain":
        given = HydraConfig.get().overrides.task
        # eval=full has the knobs of eval=default, not those of others.
        kinds = ("data.", "seed=", *(["eval."] if HydraConfig.get().runtime.choices["eval"] == "default" else []))
        same = [o for o in given if o.startswith(kinds) and o.split("=")[0] not in _PRETRAIN_ONLY]
        words = [
            "task=evaluate",
            f"data={HydraConfig.get().runtime.choices['data']}",
            *same,
            f"checkpoint={folder}",
        ]
        program = "python train.py" if Path(sys.argv[0]).name == "train.py" else "twoview"
        print(f"more:   {program} {shlex.join(words)}")


def quoted(argument: str) -> str:
    """``key=value`` with the value quoted where Hydra's grammar cannot read it, such as ``data.root=/x/München``."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"[~+]{0,2}[\w./@:-]+", key):
            value = value.replace("\\", "\\\\").replace("'", "\\'")
            return f"{key}='{value}'"
    return argument


def check_overrides(overrides: list[str], sweep: bool = False) -> list[str]:
    """Refuse overrides that the configuration cannot take, before anything heavy is imported.

    Args:
        overrides: as on the command line, already quoted.
        sweep: whether ``a=1,2`` means two runs.

    Returns:
        The overrides for Hydra: ``++`` before those into a mapping that takes any key, such as ``augment.view_b``.

    Raises:
        UserError: one sentence that names the knob, its value and the nearest valid one.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    others: list[Override] = []  # further values of a sweep
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            raise UserError(f"{text}: write KEY=VALUE, such as method.temperature=0.2") from None
        if override.is_sweep_override():
            if not sweep:
                raise UserError(f"{text}: several values are a sweep; add -m, or quote the value if it is one")
            if not override.is_discrete_sweep():
                continue
            key = override.get_key_element()
            override, *more = (parser.parse_override(f"{key}={value}") for value in override.sweep_string_iterator())
            others += more
        parsed.append(override)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        groups = [o for o in parsed if _choices(o.key_or_group)]
        _check_choices([*groups, *(o for o in others if _choices(o.key_or_group))])
        _check_groups(groups)
        base = hydra.compose("config", _texts(groups))
        knobs = _knobs(base)
        for override in [*parsed, *others]:
            if not _choices(override.key_or_group) and not override.key_or_group.startswith("hydra"):
                _check_value(override, knobs)
        try:
            cfg = hydra.compose("config", [_free(text, knobs) for text in _texts(parsed)])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(str(error).splitlines()[0]) from None
        if missing := [key for key, value in _knobs(cfg).items() if value == "???"]:
            raise UserError(f"{missing[0]} is missing: give {missing[0]}=VALUE")
    return [_free(text, knobs) for text in overrides]


def _check_choices(groups: list[Override]) -> None:
    for override in groups:
        group, choice, choices = override.key_or_group, override.value(), _choices(override.key_or_group)
        extra = _PLUGINS.get(str(choice)) if group.startswith("hydra/") and choice not in choices else None
        if extra:
            raise UserError(f'{group}={choice}: is not installed; pip install "twoview[{extra}]"')
        if choice is not None and choice not in choices:
            raise UserError(
                f"{group}={choice}: there is no {group} {str(choice)!r}; {_nearest(str(choice), choices)}"
                f"choose one of {', '.join(choices)}"
            )


def _check_groups(groups: list[Override]) -> None:
    # The task and the experiment first: they say which other groups there are.
    first = {"task": 0, "experiment": 1}
    good: list[str] = []
    for override in sorted(groups, key=lambda o: first.get(o.key_or_group, 2)):
        try:
            hydra.compose("config", [*good, *_texts([override])])
        except HydraException as error:
            task = next((o.value() for o in groups if o.key_or_group == "task"), "pretrain")
            if f"Could not override '{override.key_or_group}'" not in str(error):
                raise UserError(str(error).splitlines()[0]) from None
            raise UserError(
                f"{override.input_line}: task={task} does not use {override.key_or_group}; leave it out"
            ) from None
        good += _texts([override])


def _free(text: str, knobs: Mapping[str, Any]) -> str:
    """``++text`` where it reaches into an empty mapping, which takes any key; Hydra would refuse it."""
    key = text.partition("=")[0]
    parents = (key.rsplit(".", i)[0] for i in range(key.count(".") + 1))
    return f"++{text}" if any(knobs.get(parent) == {} for parent in parents) else text


def _check_value(override: Override, knobs: Mapping[str, Any]) -> None:
    key, value = override.key_or_group, override.value()
    if override.is_add() or override.is_delete():
        return
    if key not in knobs and _free(key, knobs) == key:
        groups = GlobalHydra.instance().config_loader().list_groups("")
        raise UserError(
            f"{key}={value}: this task has no knob {key!r}; {_nearest(key, [*knobs, *groups])}"
            "--cfg job shows all of them"
        )
    before = knobs.get(key)
    wanted = next((words for kind, words in _KINDS if isinstance(before, kind)), None)
    if value is None and before is not None and key not in _MAY_BE_NULL and not str(before).startswith("${"):
        raise UserError(f"{key}=null: this knob needs a value, such as {before}")
    if wanted and value is not None and not _fits(before, value):
        raise UserError(f"{key}={value}: give {wanted}, such as {before}")


_KINDS: list[tuple[type, str]] = [
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (list, "a list"),
    (dict, "a mapping"),
]


def _fits(before: Any, value: Any) -> bool:
    match before:
        case bool():
            return isinstance(value, bool)
        case int():
            return isinstance(value, int) and not isinstance(value, bool)
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case str():
            return True
        case list():
            return isinstance(value, list) and all(_fits(before[0], v) for v in value if before)
        case _:
            return isinstance(value, dict)


def _choices(group: str) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _texts(overrides: Iterable[Override]) -> list[str]:
    return [str(o.input_line) for o in overrides]


def _knobs(cfg: DictConfig) -> dict[str, Any]:
    """Every knob by its dotted name, mappings included, as written: interpolations are left alone."""

    def flat(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        knobs = {}
        for key, value in node.items():
            knobs[prefix + key] = value
            if isinstance(value, dict):
                knobs |= flat(value, f"{prefix}{key}.")
        return knobs

    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    # The wiring of a task repeats the groups.
    return flat({str(key): value for key, value in plain.items() if key != "task"}, "")


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _causes(error: BaseException) -> Iterable[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
