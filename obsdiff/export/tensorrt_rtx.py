"""TensorRT-RTX: obsdiff.export.tensorrt, which tells the two apart by the format in the key."""

from functools import partial

from obsdiff.export import tensorrt
from obsdiff.export.tensorrt import build, misfit, open_engine

check = partial(tensorrt.check, format="tensorrt-rtx")
make_key = partial(tensorrt.make_key, format="tensorrt-rtx")

__all__ = ["build", "check", "make_key", "misfit", "open_engine"]
