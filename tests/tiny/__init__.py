"""Tiny random pipelines of every family: `make(family, folder)`; one file a family, with its own oddities."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def make(family: str, folder: Path) -> Path:
    """Saves the family's tiny pipeline, in float32, as a diffusers folder with a generation_config.json."""
    torch.manual_seed(0)
    return importlib.import_module(f"{__name__}.{family}").make(folder)


def louder(blocks: nn.Module, factor: float = 3.0) -> None:
    """Scales the weights of blocks: as they are initialised they add too little to their input for a test to see."""
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                parameter.mul_(factor)


def save(pipe: Any, folder: Path, defaults: Mapping[str, Any]) -> Path:
    """Saves a pipeline and what it is called with unless told otherwise."""
    pipe.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(dict(defaults)))
    return folder
