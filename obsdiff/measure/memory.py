"""A process of its own that draws one batch and prints its peak memory: see latency.peak_memory."""

import json
import resource
import sys

import torch

from obsdiff.runtime.generate import call_options, generate, known_prompt
from obsdiff.runtime.pipeline import load


def main(request: str) -> int:
    path, backend, device, batch_size, overrides = json.loads(request)
    pipe = load(path, backend, device)
    generate(pipe, [known_prompt(pipe, "a photo")] * batch_size, range(batch_size), call_options(pipe, path, overrides))
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1])}\n")
