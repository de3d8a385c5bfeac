"""The environment of a measurement: text that says what it was taken on."""

import json
import os
from importlib.metadata import version

import torch

import obsdiff
from obsdiff.measure.environment import environment


def test_the_environment_names_machine_and_versions() -> None:
    found = environment()
    assert all(isinstance(value, str) and value for value in found.values())
    assert {"system", "processor", "cores", "threads", "memory", "python"} <= set(found)
    assert found["obsdiff"] == obsdiff.__version__
    assert all(found[name] == version(name) for name in ("torch", "diffusers", "transformers", "safetensors"))
    assert found["cores"] == str(os.cpu_count())
    assert found["memory"].endswith(" GiB")
    assert ("gpu" in found) == torch.cuda.is_available()
    assert json.loads(json.dumps(found)) == found


def test_the_environment_says_how_many_threads_there_are_now() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert environment()["threads"] == str(threads + 1)
    finally:
        torch.set_num_threads(threads)
