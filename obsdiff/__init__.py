"""obsdiff: prune, compile and run diffusers text-to-image pipelines.

    import obsdiff

    obsdiff.prune("my-sd3", "pruned", pattern="2:4", sparsity=0.5)
    obsdiff.export("pruned", "bundle")
    pipe = obsdiff.load("bundle")           # a diffusers pipeline
    pipe("a red ankle boot").images[0]

The names below are imported when they are first used, so `import obsdiff` stays free of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from obsdiff.errors import GateError, InputError, ObsdiffError
    from obsdiff.export.stage import export
    from obsdiff.measure.evaluate import evaluate
    from obsdiff.measure.latency import bench
    from obsdiff.measure.tune import tune
    from obsdiff.prune.stage import prune
    from obsdiff.runtime.pipeline import load

_HOME = {
    "load": "obsdiff.runtime.pipeline",
    "bench": "obsdiff.measure.latency",
    "tune": "obsdiff.measure.tune",
    "evaluate": "obsdiff.measure.evaluate",
    "ObsdiffError": "obsdiff.errors",
    "InputError": "obsdiff.errors",
    "GateError": "obsdiff.errors",
}

_STAGES = ("prune", "export")  # packages that can be called: see obsdiff.callable

__all__ = ["GateError", "InputError", "ObsdiffError", "bench", "evaluate", "export", "load", "prune", "tune"]


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"obsdiff.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'obsdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_STAGES})
