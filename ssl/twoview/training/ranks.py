"""Loss of a process of a run with several processes: which one, and the end of the others."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from twoview.errors import UserError, continue_with
from twoview.loading import LAST

# Texts of gloo, NCCL and the store that processes meet at.
_LOST = re.compile("gloo|nccl|by peer|timed out|timeout|socket|broken pipe", re.IGNORECASE)
_GRACE = 5.0  # seconds in which the main thread should notice a lost process by itself
_SETTLE = 2.0  # seconds until a process that closed its connections has ended


class Ranks:
    """The processes of a run, as seen by one of them.

    Args:
        run_dir: run folder, named in messages.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.parent = os.getppid()
        self.started: Sequence[subprocess.Popen[bytes]] = ()
        self.done = threading.Event()

    def watch(self, started: Sequence["subprocess.Popen[bytes]"]) -> None:
        """Watch the processes that rank 0 has started, in place of Lightning, which kills rank 0 without a message."""
        self.started = started
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def end(self) -> None:
        """Kill the processes that rank 0 has started."""
        self.done.set()
        for process in self.started:
            process.kill()

    def error(self, error: RuntimeError) -> UserError | None:
        """The sentence for a failure to communicate; None for any other failure.

        Raises:
            SystemExit: code 0 on a rank whose parent, rank 0, prints the sentence.
        """
        if not _LOST.search(str(error)):
            return None
        end = time.monotonic() + _SETTLE
        while self._lost() is None and time.monotonic() < end:
            time.sleep(0.1)
        lost = self._lost()
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        alone = "TORCHELASTIC_RUN_ID" in os.environ or rank == 0
        if not alone and (lost is None or rank > 1):
            sys.exit(0)
        return self._sentence(lost or "another process did not answer within trainer.timeout")

    def _sentence(self, lost: str) -> UserError:
        saved = (self.run_dir / "checkpoints" / LAST).is_file()
        what = continue_with(self.run_dir) if saved else "no checkpoint had been written"
        return UserError(f"{lost}; the other processes were ended; {what}")

    def _lost(self) -> str | None:
        """Which process has been stopped, killed or has failed, as seen from here."""
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            return "rank 0 was killed" if os.getppid() != self.parent else _stopped(0, self.parent)
        codes = {rank: process.poll() for rank, process in enumerate(self.started, 1)}
        pids = {rank: process.pid for rank, process in enumerate(self.started, 1) if codes[rank] is None}
        stopped = (_stopped(rank, pid) for rank, pid in pids.items())
        killed = (f"rank {rank} was killed by {_name(-code)}" for rank, code in codes.items() if code and code < 0)
        failed = (f"rank {rank} ended with exit code {code}" for rank, code in codes.items() if code and code > 0)
        return next((text for texts in (killed, stopped, failed) for text in texts if text), None)

    def _watch(self) -> None:
        while not self.done.wait(0.5):
            if any(process.poll() for process in self.started) and not self.done.wait(_GRACE):
                print(f"twoview: {self._sentence(str(self._lost()))}", file=sys.stderr, flush=True)
                self.end()
                os._exit(2)


def _stopped(rank: int, pid: int) -> str | None:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
    return f"rank {rank} was stopped by a signal (process {pid})" if state in "Tt" else None


def _name(number: int) -> str:
    return signal.Signals(number).name if number in [*signal.Signals] else f"signal {number}"
