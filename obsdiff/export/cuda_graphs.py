"""CUDA graphs: what a call launches is recorded once for each set of shapes and replayed as a whole."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import first_line

LIMIT = 8  # graphs that are kept; each holds its inputs, its output and what it was launched with
Denoise = Callable[..., Tensor]
Record = Callable[[Denoise, Mapping[str, Tensor]], Denoise]


def with_graphs(denoise: Denoise, *, record: Record | None = None, limit: int = LIMIT) -> Denoise:
    """`denoise(**tensors)` from CUDA graphs: recorded the second time that shapes come, replayed from then on.

    Shapes that come once cost nothing extra; of those that come again the last `limit` are kept. Results own their
    memory. One call runs at a time. Where recording fails (a call that waits for the GPU) it warns, once, and
    calls `denoise` as it is.
    """
    take = record or Recorder()
    graphs: OrderedDict[Any, Denoise | None] = OrderedDict()  # None: seen once
    lock = threading.Lock()
    failed = False

    def call(**inputs: Tensor) -> Tensor:
        nonlocal failed
        if failed:
            return denoise(**inputs)
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))
        with lock:
            if shapes not in graphs:
                graphs[shapes] = None
                result = denoise(**inputs)
            else:
                try:
                    replay = graphs[shapes] = graphs[shapes] or take(denoise, inputs)
                except RuntimeError as error:
                    warnings.warn(f"goes on without CUDA graphs: {first_line(error)}", RuntimeWarning, stacklevel=2)
                    failed = True
                    graphs.clear()
                    return denoise(**inputs)
                result = replay(**inputs)
            graphs.move_to_end(shapes)
            while len(graphs) > limit:
                graphs.popitem(last=False)
            return result

    return call


class Recorder:
    """Records graphs that share their memory: one is replayed at a time, and its output is copied at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, denoise: Denoise, inputs: Mapping[str, Tensor]) -> Denoise:
        device = next(iter(inputs.values())).device
        with torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            held = {name: value.contiguous().clone() for name, value in inputs.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is set up by a first call must not be recorded
                denoise(**held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: that is none of this capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = denoise(**held)

        def replay(**values: Tensor) -> Tensor:
            for name, value in values.items():
                held[name].copy_(value)
            graph.replay()
            return output.clone()

        return replay
