"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user asked for: one sentence that names the knob, its value and what to do.

    The command line prints it without a traceback and exits with code 2; in a notebook it is a plain ``ValueError``.
    """


class Interrupted(Exception):  # noqa: N818 (nothing is wrong)
    """A run was asked to stop by a signal, and has been saved.

    Attributes:
        code: what the process should exit with.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
