"""Errors that a user can act on. The command line prints their message alone and exits with their code."""


class ObsdiffError(Exception):
    """Something failed while working; what was there before is still there."""

    exit_code = 1


class InputError(ObsdiffError, ValueError):
    """The input or an option is wrong: nothing was started."""

    exit_code = 2


class GateError(ObsdiffError):
    """Everything ran, and a condition that the user set was not met."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the pages that follow it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
