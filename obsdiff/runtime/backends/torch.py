"""The narrower diffusers module itself, in PyTorch."""

from pathlib import Path

import torch
from torch import Tensor

from obsdiff.export.bundle import Manifest
from obsdiff.export.program import load_module
from obsdiff.runtime.backends import Denoise


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Raises InputError when the groups or the weights do not fit the config."""
    module = load_module(bundle, manifest, device)

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        return module(*(inputs[entry.name] for entry in module.entries))

    return denoise
