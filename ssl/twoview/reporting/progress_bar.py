"""Progress bar of an evaluation."""

import sys
import threading

import rich
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twoview.distributed import rank_and_world
from twoview.evaluation.progress import LONG


class EvaluationBar:
    """Progress bar of one part at a time, with elapsed and remaining time; implements the Display of an evaluation.

    The bar is shown in a terminal on rank 0 only, once the part has taken ``after`` seconds. For a part that does not
    count steps, it shows the elapsed time.

    Args:
        after: seconds.

    Example:
        >>> bar = EvaluationBar()
        >>> bar.start("trained: knn")
        >>> bar.update(1, 2)
        >>> bar.stop()
    """

    def __init__(self, after: float = LONG) -> None:
        self.after = after
        self.progress: Progress | None = None

    def start(self, name: str) -> None:
        """Show the bar of a part after some seconds."""
        if not sys.stdout.isatty() or rank_and_world()[0]:
            return
        self.progress = Progress(
            TextColumn("evaluation: {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=rich.get_console(),
            transient=True,
        )
        self.task = self.progress.add_task(name, total=None)
        self.timer = threading.Timer(self.after, self.progress.start)
        self.timer.daemon = True
        self.timer.start()

    def update(self, done: int, total: int) -> None:
        """Show how many steps are done."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done, total=total)

    def stop(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.timer.cancel()
            self.timer.join()  # it may be showing the bar at this moment
            self.progress.stop()
            self.progress = None
