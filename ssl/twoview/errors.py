"""Exceptions shown to users without a traceback."""


class UserError(ValueError):
    """Invalid input of the user; the message is one sentence with the knob, its value and what to do.

    The command line prints the message without a traceback and exits with code 2; in Python it is a ``ValueError``.

    Example:
        >>> raise UserError("optimizer.lr=-1: the learning rate must be above 0")
        Traceback (most recent call last):
        twoview.errors.UserError: optimizer.lr=-1: the learning rate must be above 0
    """


def require(condition: object, message: str) -> None:
    """Raise :class:`UserError` with a message unless a condition is true.

    Example:
        >>> require(0 < 0.1, "optimizer.lr=0.1: the learning rate must be above 0")
    """
    if not condition:
        raise UserError(message)


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A run stopped on a signal, after its checkpoint was saved.

    Args:
        message: shown to the user.
        code: exit code of the process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
