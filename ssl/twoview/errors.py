"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user asked for: one sentence that names the knob, its value and what to do.

    The command line prints it without a traceback and exits with code 2; in a notebook it is a plain ``ValueError``.
    """
