"""Errors that a user can act on. The command line prints their message alone and exits with their code."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ObsdiffError(Exception):
    """Something failed while working; what was there before is still there."""

    exit_code = 1


class InputError(ObsdiffError, ValueError):
    """The input or an option is wrong: nothing was started."""

    exit_code = 2


class GateError(ObsdiffError):
    """Everything ran, and a condition that the user set was not met."""

    exit_code = 3


def first_problem(error: "ValidationError") -> str:
    """Where pydantic found the first thing wrong, and what: `settings.steps: Input should be a valid integer`."""
    first = error.errors()[0]
    where = repr(".".join(map(str, first["loc"])))[1:-1][:80] or "the file"
    return f"{where}: {first['msg'].removeprefix('Value error, ')[:200]}"


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the pages that follow it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
