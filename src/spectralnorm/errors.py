"""The one exception that means: the user asked for something that cannot be done.

Its message is a single clear sentence (what was expected, what came, what to do). The command line prints it
without a traceback and exits with status 2; from Python it is a ``ValueError`` like any other.
"""

__all__ = ["UserError"]


class UserError(ValueError):
    """A request that cannot be carried out, told in one sentence for a person to read."""
