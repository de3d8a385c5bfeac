"""The narrower diffusers module itself, in PyTorch."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from obsdiff.errors import InputError
from obsdiff.export.bundle import CONFIG, WEIGHTS, Manifest
from obsdiff.files import read_json
from obsdiff.models import graph
from obsdiff.models.shrink import shrink
from obsdiff.models.source import quiet_libraries
from obsdiff.runtime.backends import Denoise


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Rebuilds the module from the bundle's config and groups; its parameters are never held twice.

    Raises InputError when the groups or the weights do not fit the config.
    """
    import diffusers
    from accelerate import init_empty_weights

    spec = manifest.spec
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            config = read_json(bundle / CONFIG)
            denoiser = getattr(diffusers, spec.denoiser).from_config(config)
        shrink(denoiser, spec, manifest.groups)
        denoiser.load_state_dict(load_file(bundle / WEIGHTS), assign=True)
    except InputError:
        raise
    except Exception as error:  # diffusers and safetensors each raise their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{bundle}: the denoiser's config and weights do not fit each other: {reason}") from None
    call = graph.TensorDenoiser(denoiser.to(device).eval().requires_grad_(False), spec)

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        return call(*(inputs[entry.name] for entry in call.entries))

    return denoise
