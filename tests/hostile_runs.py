"""Command lines run in forked processes: torch is imported once, and a case takes about a second.

A case ends with an exit code, stdout and stderr, or is killed at its time limit. Whatever it wrote outside of the
folder ``runs`` of its working folder is listed.
"""

import contextlib
import itertools
import logging
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import rich

import twoview.cli
import twoview.runs  # imported before the fork, so that no case waits for torch

LIMIT = 20.0  # seconds
_NUMBERS = itertools.count()  # of the commands, in the names of their files
SHORT = (
    "backbone.name=test_resnet",
    "backbone.stem=small_stride2",
    "data.image_size=16",
    "trainer.max_steps=2",
    "eval.baselines=false",
)


@dataclass(frozen=True)
class Outcome:
    """End of a case.

    Attributes:
        code: exit code, "time limit" if the case was killed.
        out: text of stdout.
        err: text of stderr.
        outside: files that were created, changed or removed outside of ``runs``.
    """

    code: int | str
    out: str
    err: str
    outside: list[str]

    def refused(self, message: str = "", code: int = 2) -> bool:
        """Whether the case ended with one sentence on stderr that contains a message, and wrote nothing outside."""
        lines = self.err.strip().splitlines()
        one = len(lines) == 1 and lines[0].startswith("twoview: ") and "Traceback" not in self.out
        return self.code == code and one and message in self.err and not self.outside


@dataclass(frozen=True)
class Command:
    """A command line that runs in a process of its own.

    Attributes:
        pid: id of the process, which leads a group of its own.
        out: file of its stdout.
        err: file of its stderr.
    """

    pid: int
    out: Path
    err: Path

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs. Not to be called after it returned a code."""
        found, raw = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(raw) if found else None

    def wait(self, limit: float = LIMIT) -> int | str:
        """Exit code, as by :meth:`poll`; "time limit" if the process was killed after ``limit`` seconds."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if (code := self.poll()) is not None:
                return code
            time.sleep(0.01)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return "time limit"

    def texts(self) -> list[str]:
        """What was written to stdout and stderr, whose files are removed."""
        texts = [file.read_text(errors="replace") for file in (self.out, self.err)]
        for file in (self.out, self.err):
            file.unlink()
        return texts


def start(folder: Path, *arguments: str, prepare=lambda: None, main=None) -> Command:
    """Start ``twoview ARGUMENTS``, or another main function, in a folder; other arguments are those of :func:`run`."""
    folder.mkdir(parents=True, exist_ok=True)
    number = next(_NUMBERS)
    out, err = (folder.parent / f".{folder.name}.{number}.{name}" for name in ("out", "err"))
    for file in (out, err):
        file.touch()
    child = os.fork()
    if not child:
        _run_child(folder, arguments, out, err, prepare, main or twoview.cli.main)
    return Command(child, out, err)


def run(folder: Path, *arguments: str, limit: float = LIMIT, prepare=lambda: None) -> Outcome:
    """Run ``twoview ARGUMENTS`` in a folder.

    Args:
        folder: working folder; its parent is watched for files written outside of ``folder/runs``.
        arguments: the command line.
        limit: seconds until the case is killed.
        prepare: called in the forked process before the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _files(folder.parent, folder / "runs")
    command = start(folder, *arguments, prepare=prepare)
    code = command.wait(limit)
    out, err = command.texts()
    after = _files(folder.parent, folder / "runs")
    changed = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Outcome(code, out, err, changed)


def _run_child(folder, arguments, out, err, prepare, main):
    """Never returns."""
    code = 70
    try:
        multiprocessing.util._run_after_forkers()  # or loader processes would wait for a thread of the parent
        os.setsid()
        # As in a process that a shell starts; the processes of pytest-xdist may have other handlers.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        for number, target in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(target, os.O_RDWR | os.O_CREAT, 0o644), number)
        # Without pytest's own streams, log handlers and filters.
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w", 1, closefd=False) for n in range(3))
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        for name in ("http_proxy", "https_proxy"):
            os.environ[name] = "http://127.0.0.1:9"
        os.environ |= {"HOME": str(folder), "COLUMNS": "200", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        for name in ("HYDRA_FULL_ERROR", "PYTEST_CURRENT_TEST"):
            os.environ.pop(name, None)
        sys.argv = ["twoview", *arguments]
        prepare()
        rich.reconfigure()  # or the console would be that of earlier tests, which had no terminal
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _files(root: Path, apart: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below a folder, without following links, except below ``apart``."""
    found = {}
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if Path(parent, name) != apart]
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            found[Path(parent, name)] = (status.st_size, status.st_mtime_ns)
    return found
