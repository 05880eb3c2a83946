"""The errors a user can cause, each with the exit code of the command line.

A message names the object, what was expected, what was found and the remedy, in one line.
"""


class FedparaError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(FedparaError):
    """An argument, a data file, a model or an option does not fit: exit code 2."""

    exit_code = 2


class InvalidUpdateError(FedparaError):
    """An update file can't be used: exit code 3."""

    exit_code = 3


class TooFewUpdatesError(FedparaError):
    """Fewer valid updates than asked for: exit code 4."""

    exit_code = 4


class WrongBundleError(FedparaError):
    """A bundle, weights or update file does not belong with the others, or was changed: exit code 6."""

    exit_code = 6
