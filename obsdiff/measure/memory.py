"""A process of its own that draws one batch and prints its peak memory: see latency.peak_memory."""

import json
import resource
import sys
from pathlib import Path

import torch

from obsdiff.runtime.generate import call_options, generate, known_prompt
from obsdiff.runtime.pipeline import load


def main(request: str) -> int:
    path, backend, device, batch_size, overrides = json.loads(request)
    pipe = load(path, backend, device)
    generate(pipe, [known_prompt(pipe, "a photo")] * batch_size, range(batch_size), call_options(pipe, path, overrides))
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def peak_resident() -> int:
    """Bytes that this process held at most. Linux keeps the starting process's own peak in ru_maxrss across an exec."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1])}\n")
