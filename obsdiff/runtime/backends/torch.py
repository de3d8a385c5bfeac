"""The narrower diffusers module itself, in PyTorch."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from obsdiff.export.bundle import CONFIG, WEIGHTS, Manifest
from obsdiff.export.shrink import shrink
from obsdiff.files import read_json
from obsdiff.models import find_spec
from obsdiff.models.source import quiet_libraries
from obsdiff.runtime.backends import Denoise


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Rebuilds the module from the bundle's config and groups; its parameters are never held twice."""
    import diffusers
    from accelerate import init_empty_weights

    with quiet_libraries(), init_empty_weights(include_buffers=False):
        denoiser = getattr(diffusers, manifest.denoiser).from_config(read_json(bundle / CONFIG))
    shrink(denoiser, find_spec(manifest.denoiser), manifest.groups)
    denoiser.load_state_dict(load_file(bundle / WEIGHTS), assign=True)
    denoiser.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        return denoiser(**inputs, return_dict=False)[0]

    return denoise
