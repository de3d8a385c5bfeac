"""Stages are both packages (obsdiff.prune.solvers) and verbs (obsdiff.prune(...)): modules that can be called."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Lets the imported package `package` be called as `function` of its module `stage`, imported when it is."""

    class Stage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(f"{package}.stage"), function)(*args, **kwargs)

    sys.modules[package].__class__ = Stage
