"""Exceptions that are shown to users without a traceback, and checks that raise them."""

import shlex
from collections.abc import Sequence


class UserError(ValueError):
    """Invalid input of the user.

    The message is one sentence: the knob (configuration key), its value, and advice. The command line prints the
    message without a traceback and exits with code 2.

    Example:
        >>> raise UserError("optimizer.lr=-1: the learning rate must be above 0")
        Traceback (most recent call last):
        twoview.errors.UserError: optimizer.lr=-1: the learning rate must be above 0
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # a DataLoader adds the traceback of its process to the message
            message = message.rpartition("UserError: ")[2]
        # Messages of other libraries have several lines, names of files any character, such as two spaces.
        line = " ".join(filter(None, map(str.strip, message.splitlines())))
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def require(condition: object, message: str) -> None:
    """Raise :class:`UserError` with the message unless the condition is true.

    Example:
        >>> require(0 < 0.1, "optimizer.lr=0.1: the learning rate must be above 0")
    """
    if not condition:
        raise UserError(message)


def require_choice(group: str, choices: Sequence[str], **knobs: str) -> None:
    """Raise :class:`UserError` unless the value of every knob is one of the choices.

    Args:
        group: configuration group of the knobs, for the message.
        choices: allowed values.
        **knobs: values by name.

    Example:
        >>> require_choice("augment", ("bilinear", "bicubic"), interpolation="bicubic")
    """
    for knob, value in knobs.items():
        require(value in choices, f"{group}.{knob}={value}: choose one of {', '.join(choices)}")


def require_at_least(group: str, least: int, **knobs: int | None) -> None:
    """Raise :class:`UserError` unless the value of every knob is None or an integer >= ``least``.

    Args:
        group: configuration group of the knobs, for the message.
        least: smallest allowed value.
        **knobs: values by name.

    Example:
        >>> require_at_least("trainer", 1, devices=2, max_steps=None)
    """
    for knob, value in knobs.items():
        fits = value is None or (isinstance(value, int) and value >= least)
        require(fits, f"{group}.{knob}={value}: give a whole number, at least {least}")


def require_positive(group: str, **knobs: Sequence[float]) -> None:
    """Raise :class:`UserError` unless the value of every knob is a non-empty list of numbers above 0.

    Args:
        group: configuration group of the knobs, for the message.
        **knobs: lists by name.

    Example:
        >>> require_positive("eval", k=[1, 5], temperature=[0.07])
    """
    for knob, values in knobs.items():
        positive = values and all(isinstance(v, int | float) and v > 0 for v in values)
        require(positive, f"{group}.{knob}={list(values)}: give one or more numbers above 0")


def continue_with(run_dir: object) -> str:
    """Return the advice how a stopped run is resumed, with its folder quoted for a shell.

    Example:
        >>> print(continue_with("runs/a"), continue_with("my runs/a"), sep="; ")
        continue with resume=runs/a; continue with 'resume=my runs/a'
    """
    return f"continue with {shlex.quote(f'resume={run_dir}')}"


class Interrupted(Exception):  # noqa: N818 (not an error)
    """Raised when a signal has stopped a run, after its checkpoint was saved.

    Args:
        message: message for the user.
        code: exit code of the process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
