"""Progress of an evaluation: parts with a name and a duration, and steps within a part."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)

LONG = 5.0  # seconds after which a part is shown and logged

T = TypeVar("T")


class Display(Protocol):
    """What shows the progress, such as :class:`twoview.reporting.progress_bar.ProgressBar`."""

    def start(self, name: str) -> None:
        """A part with this name has begun."""

    def update(self, done: int, total: int) -> None:
        """So many of so many steps of the part are done."""

    def stop(self) -> None:
        """The part has ended."""


@dataclass
class _Part:
    display: Display | None
    done: int = 0
    total: int = 0

    def add(self, done: int, total: int) -> None:
        self.done, self.total = self.done + done, self.total + total
        if self.display is not None:
            self.display.update(self.done, self.total)


_display: ContextVar[Display | None] = ContextVar("display", default=None)
_part: ContextVar[_Part | None] = ContextVar("part", default=None)


@contextlib.contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Show the parts inside of this context by a display."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """A part of the evaluation. If it takes more than five seconds, it is shown, and its duration is logged.

    Args:
        name: what is computed, and for which network.
    """
    display, start = _display.get(), time.monotonic()
    token = _part.set(_Part(display))
    if display is not None:
        display.start(name)
    try:
        yield
    finally:
        if display is not None:
            display.stop()
        _part.reset(token)
    seconds = time.monotonic() - start
    if seconds > LONG:
        log.info("evaluation: %s took %s", name, duration(seconds))


def add_steps(done: int = 0, total: int = 0) -> None:
    """Count steps of the current part, for the progress display; does nothing outside of a part.

    Args:
        done: number of further steps that are done.
        total: number of further steps that there are to do.

    Example:
        >>> with part("two steps"):
        ...     add_steps(total=2)
        ...     add_steps(done=2)
    """
    current = _part.get()
    if current is not None:
        current.add(done, total)


def track(items: Sequence[T]) -> Iterator[T]:
    """Iterate over items, each of which is a step of the current part.

    Args:
        items: what to iterate over. Several sequences in the same part, one after the other, are counted together.

    Example:
        >>> [2 * x for x in track([1, 2, 3])]
        [2, 4, 6]
    """
    add_steps(total=len(items))
    for item in items:
        yield item
        add_steps(done=1)


def duration(seconds: float) -> str:
    """Format a duration, such as "12 s", "4 min" or "2.5 h".

    Example:
        >>> duration(12.3), duration(250), duration(9000)
        ('12 s', '4 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
