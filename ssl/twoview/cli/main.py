"""Command line: entry point, execution of one job, and printed report."""

import contextlib
import io
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from twoview.cli import sweeps
from twoview.cli.failures import propagated, system_error, watched_output
from twoview.cli.imports import import_runs
from twoview.cli.overrides import CONF, check_overrides, quoted, typed, without
from twoview.cli.own_folder import take_own_folder
from twoview.cli.resume import common_folder, resolve_resume, training_knobs
from twoview.cli.stored import OVERRIDES, dump_overrides
from twoview.errors import Interrupted, UserError, require
from twoview.files import remove_left_over, write_atomically

log = logging.getLogger(__name__)

# Knobs of pretraining that are not passed to task=evaluate, which reads their values from the checkpoint.
_PRETRAIN_ONLY = ("data.image_size", "data.store_size", "data.channels")

# Maximize the metric. A fixed seed repeats the same trials, so that finished runs are found again.
_OPTUNA = ("hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0")

# Override for -v. Unlike a flag, an override is passed to the jobs of every launcher.
_VERBOSE = "++hydra.job_logging.handlers.console.level=DEBUG"


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: exit code 2 after a :class:`UserError` or if a file or stdout cannot be written, 1 if a run of a
            sweep failed, 130 after Ctrl-C, the code of :class:`Interrupted`, and otherwise the ``exit_code`` of the
            report, if it has one above 0. A sweep does not use the codes of its reports.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files need not be valid text
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a closed pipe; the first output fails, and is reported
                stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a log that cannot be written does not print tracebacks
    with watched_output() as output:
        try:
            _command()
        except SystemExit as stop:
            if stop.code:
                raise
    if output.error is not None:
        _end(f"stdout: {output.error.strerror}; what could not be written was left out, the files are complete", 2)


def _command() -> None:
    arguments = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    verbose = [_VERBOSE] if len(arguments) < len(sys.argv[1:]) else []
    sweep = any(a in ("-m", "--multirun", "hydra.mode=MULTIRUN") for a in arguments)
    try:
        own_folder, arguments = take_own_folder(arguments)
        flags = [a for a in arguments if a.startswith("-")]
        arguments = [a if a.startswith("-") else quoted(a, sweep) for a in arguments]
        overrides = [a for a in arguments if not a.startswith("-")]
        for flag in (a for a in get_args_parser().parse_known_args(arguments)[1] if a.startswith("-")):
            raise UserError(
                f"{flag}: there is no such option; write {flag.lstrip('-')}{'' if '=' in flag else '=VALUE'}"
            )
        overrides = resolve_resume(overrides, sweep)
        # With other flags, Hydra starts no run: help, printed configuration, shell completion.
        if sweep or not flags:
            arguments = [*flags, *check_overrides(overrides, sweep), *common_folder(overrides, sweep)]
        sys.argv[1:] = [*own_folder, *arguments, *verbose]
        if "hydra/sweeper=optuna" in overrides:
            given = {o.partition("=")[0] for o in overrides}
            sys.argv += [o for o in _OPTUNA if not {o.partition("=")[0], "hydra/sweeper/sampler"} & given]
        folder = sweeps.begin(overrides) if sweep else None
        try:
            with propagated():
                hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job)()
        finally:
            failed = sweeps.summarize(folder) if folder is not None and folder.is_dir() else 0
    except KeyboardInterrupt as stop:
        _end(stop.args[0] if stop.args else "stopped", 130)
    except Exception as error:
        user_error = _user_error(error)
        if user_error is None and not isinstance(error, HydraException):
            raise
        _end(user_error or " ".join(f"{error} {error.__cause__ or ''}".split()), 2)
    if failed:
        sys.exit(1)


def _end(message: object, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"twoview: {message}", file=sys.stderr)
    sys.exit(code)


def _job(cfg: DictConfig) -> float | None:
    """Run one job. Return the metric that a sweeper optimizes; None if the metric is missing or not finite."""
    job, name, figure, mistake = HydraConfig.get(), cfg.get("select_by"), None, None
    sweep = job.mode == hydra.types.RunMode.MULTIRUN
    try:
        report = sweeps.run_ranks() if sweep and cfg.get("trainer", {}).get("devices", 1) > 1 else _run(cfg, sweep)
        figures = report.get("figures", {})
        name = name or next((key for key, value in figures.items() if value is not None), None)
        figure = figures.get(name)
        figure = figure if figure is not None and math.isfinite(figure) else None
    except Interrupted as stop:
        # SystemExit also ends a sweep. Ranks started by Lightning exit with 0, otherwise Lightning would kill rank 0.
        started = int(os.environ.get("LOCAL_RANK", "0")) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        _end(stop, 0 if started else stop.code)
    except Exception as error:
        log.debug("the run failed", exc_info=True)
        user_error = _user_error(error, os.path.relpath(job.runtime.output_dir) if "resume" in cfg else None)
        if os.environ.get("HYDRA_FULL_ERROR") or not (user_error or sweep):
            raise
        if not sweep:  # SystemExit, because Hydra prints other exceptions with a traceback
            _end(user_error, 2)
        # Record the failure; the other runs of the sweep continue.
        log.error("%s: %s", " ".join(job.overrides.task), user_error or "failed", exc_info=user_error is None)
        mistake = str(user_error or f"{type(error).__name__}: {error}")
    if sweep:
        folder = os.path.relpath(job.runtime.output_dir)
        sweeps.record(job.job.num, job.overrides.task, folder, name, figure, mistake)
    elif report.get("exit_code"):
        sys.exit(report["exit_code"])
    return figure


def _run(cfg: DictConfig, sweep: bool) -> Mapping[str, Any]:
    """Instantiate the arguments of the task, call its function, and print the report.

    Returns:
        The report; an empty mapping if the task has no report.
    """
    selectable = import_runs().SELECTABLE  # imported late: errors in knobs are reported before torch is imported
    select_by, choices = cfg.get("select_by"), ", ".join(selectable)
    require(select_by in (None, *selectable), f"select_by={select_by}: choose one of {choices}")
    measured = select_by is None or re.sub("val/|_top1", "", select_by) in cfg.eval.parts
    require(measured, f"select_by={select_by}: this is not among eval.parts={cfg.get('eval', {}).get('parts')}")
    require(0 <= cfg.seed < 2**32, f"seed={cfg.seed}: give a whole number from 0 to {2**32 - 1}")
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if rank != "0":
        _set_rank_logging(rank)
    task = cfg.task
    if sweep and "resume" in task.get("run", {}):  # a repeated sweep resumes its unfinished runs
        task = OmegaConf.merge(task, {"run": {"resume": True}})
    parts = {str(name): _instantiate(str(name), node) for name, node in task.items() if name != "_target_"}
    folder, overrides = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    config = OmegaConf.to_yaml(without(cfg, "task"), resolve=True)
    if "run" in parts:  # written once the run has been accepted, so that a refused start changes nothing
        files = {"config.yaml": config, OVERRIDES: dump_overrides(overrides)}
        parts["run"] = replace(parts["run"], files=files, knobs=training_knobs(cfg))
    else:
        _check_folder(folder, config)
        remove_left_over(folder, seconds=60)
        write_atomically(folder / "config.yaml", config)
    result = hydra.utils.get_method(task._target_)(**parts)
    report = result if isinstance(result, Mapping) else {}
    if "results" in report or "runs" in report:
        _print_report(report)
    return report


def _check_folder(folder: Path, config: str) -> None:
    """Refuse a folder with the report of another run, which would be overwritten."""
    try:
        equal = (folder / "config.yaml").read_text(encoding="utf-8") == config
    except (OSError, ValueError):
        equal = False
    message = "this folder holds the report of another run; choose another one"
    require(equal or not (folder / "report.json").exists(), f"hydra.run.dir={os.path.relpath(folder)}: {message}")


def _instantiate(name: str, node: Any) -> Any:
    """Instantiate an argument of the task by its ``_target_``; plain values are returned unchanged."""
    try:
        return hydra.utils.instantiate(node, _convert_="all") if OmegaConf.is_config(node) else node
    except HydraException as error:
        if _user_error(error):
            raise
        # Invalid combination of knobs, or an optional dependency that is not installed.
        raise UserError(f"{name}: {str(error.__cause__ or error).splitlines()[0]}") from error


def _set_rank_logging(rank: str) -> None:
    """Set the logging of a rank other than 0: console shows errors only, lines of run.log name the rank."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
        else:
            handler.setLevel(logging.ERROR)


def _print_report(report: Mapping[str, Any]) -> None:
    from twoview.evaluation.compare import comparison_tables
    from twoview.reporting.tables import show, tables

    shown = comparison_tables(report) if report["task"] == "compare" else tables(report)
    for table in shown if report["task"] in ("evaluate", "compare") else shown[:1]:
        if table.title not in ("Classes", "Invariance"):  # too long for a terminal; shown in report.html and report.md
            show(table)
    folder = os.path.relpath(report["run_dir"])
    pages = ("report.html", "report.md", "report.json")
    print("report: " + ", ".join(f"{folder}/{name}" for name in pages if (Path(folder) / name).exists()))
    if report["task"] == "pretrain":
        given, choices = HydraConfig.get().overrides.task, HydraConfig.get().runtime.choices
        # task=evaluate uses eval=full, which has all knobs of eval=default but not those of other choices.
        kinds = ("data.", "seed=", *(["eval."] if choices["eval"] == "default" else []))
        same = [o for o in given if o.startswith(kinds) and o.split("=")[0] not in _PRETRAIN_ONLY]
        words = ["task=evaluate", f"data={choices['data']}", *same, quoted(f"checkpoint={folder}")]
        program = ["python", sys.argv[0]] if Path(sys.argv[0]).name == "train.py" else ["twoview"]
        print(f"more:   {shlex.join(program)} {' '.join(map(typed, words))}")


def _user_error(error: BaseException, folder: str | None = None) -> UserError | None:
    """Return the first UserError in the chain of causes of an exception, or the sentence of a system error."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, UserError):
        first = first.__cause__ or first.__context__
    return first or system_error(error, folder)
