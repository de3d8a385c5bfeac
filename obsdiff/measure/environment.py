"""What a measurement was taken on: without it a number means nothing."""

import os
import platform

import psutil
import torch

from obsdiff import nvml
from obsdiff.checkpoint import versions
from obsdiff.device import processor


def environment(device: str = "cuda") -> dict[str, str]:
    """Processor, memory, threads, versions, and the GPU if the device is one and there, as text."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        if seen := nvml.find_gpu(device):
            found |= nvml.describe(seen)
    return found | versions()
