"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
    """A mistake in an argument, a config or a file: what, where, which value, how to mend it.

    The scripts print it as one sentence and exit with status 2; what is no such error keeps its
    traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on though its input was accepted, such as a loss that became NaN.

    The scripts print it as one sentence and exit with status 1.
    """
