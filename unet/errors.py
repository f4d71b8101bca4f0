"""How a script ends early: a mistake that the user can mend, a run that cannot go on, a signal."""


class InputError(ValueError):
    """A mistake in an argument, a config or a file: what, where, which value, how to mend it.

    The scripts print it as one sentence and exit with status 2; what is no such error keeps its
    traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on though its input was accepted, such as a loss that became NaN.

    The scripts print it as one sentence and exit with status 1.
    """


class DiskError(RunError):
    """A file of a run that cannot be written, as where the disk is full."""


class Interrupted(SystemExit):
    """SIGINT or SIGTERM ended a run after its state was saved; the code is 128 + the signal."""
