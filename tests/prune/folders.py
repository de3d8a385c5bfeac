"""Model folders: what is in them, and copies with changed weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from obsdiff.files import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below the folder, hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / WEIGHTS)


def changed_model(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the model whose denoiser's tensors went through `change`."""
    shutil.copytree(source, target)
    tensors = weights_of(source)
    change(tensors)
    save_file(tensors, target / "transformer" / WEIGHTS, metadata={"format": "pt"})
    return target
