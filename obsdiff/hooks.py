"""Calls of diffusers' modules and samplers, as they are seen from outside."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def named_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those given by position first."""
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) | dict(kwargs)


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes for the arguments that are left out."""
    parameters = inspect.signature(function).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not entry.empty}


@contextlib.contextmanager
def step_results(scheduler: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """Hands `take` what every step of the sampler returns while the body runs: not every pipeline has callbacks."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature: whether it takes a generator, for one
    def told(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        take(result)
        return result

    scheduler.step = told
    try:
        yield
    finally:
        del scheduler.step


def after_steps(scheduler: Any, tell: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Calls `tell` after every step of the sampler while the body runs."""
    return step_results(scheduler, lambda _: tell())
