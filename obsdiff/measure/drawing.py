"""A path's pictures for an eval: drawn, or found where an interrupted one left them."""

import gc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from obsdiff.checkpoint import versions
from obsdiff.errors import InputError
from obsdiff.files import write_tensors
from obsdiff.hooks import defaults
from obsdiff.measure import quality
from obsdiff.measure.comparable import Subject
from obsdiff.measure.quality import Drawn
from obsdiff.models import pipeline_spec
from obsdiff.models.source import quiet_libraries
from obsdiff.progress import Progress
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import load

DRAWN = ".drawn"  # in --out: the pictures of paths that are done, until all are


@dataclass(frozen=True)
class Asked:
    """What every path is asked to draw, and how."""

    prompts: list[str]
    seeds: range
    options: Mapping[str, Any]
    batch_size: int
    backend: str
    device: str


def draw_subject(subject: Subject, asked: Asked, out: Path | None, progress: Progress) -> tuple[Drawn, dict[str, Any]]:
    """A path's pictures and what they were drawn with; those that an interrupted eval left in `out` count."""
    backend = asked.backend if subject.is_bundle or asked.backend == "torch" else "auto"
    request = [subject.path, subject.stamp(), asked.prompts, list(asked.seeds), dict(asked.options)]
    setting = [asked.batch_size, backend, asked.device, versions()]
    name = hashlib.sha256(json.dumps([request, setting], sort_keys=True).encode()).hexdigest()[:32]
    kept = out / DRAWN / f"{name}.safetensors" if out else None
    if kept and kept.exists() and (found := _read(kept)):
        progress.advance(len(asked.prompts))
        return found
    pipe = load(subject.path, backend, asked.device)
    options = call_options(pipe, subject.path, asked.options)
    try:
        with quiet_libraries():
            drawn = quality.draw(pipe, asked.prompts, asked.seeds, options, asked.batch_size, progress.advance)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{subject.path}: out of memory at {asked.batch_size} images at once: try a smaller --batch-size"
        ) from None
    full, spec = defaults(pipe.__call__) | options, pipeline_spec(pipe)
    note = {
        "backend": getattr(pipe, "obsdiff_backend", "torch"),
        "steps": full.get("num_inference_steps"),
        "guidance_scale": full.get(spec.guidance if spec else "guidance_scale"),
    }
    del pipe
    gc.collect()  # a pipeline holds itself in cycles, and the next one needs its memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in drawn.images]))
        tensors = {"latents": drawn.latents.contiguous(), "pixels": pixels}
        write_tensors(kept, tensors, {"note": json.dumps(note)})
    return drawn, note


def _read(kept: Path) -> tuple[Drawn, dict[str, Any]] | None:
    """Pictures that were kept; None when they cannot be read."""
    try:
        with safe_open(kept, "pt") as file:
            images = [Image.fromarray(pixels) for pixels in file.get_tensor("pixels").numpy()]
            return Drawn(images, file.get_tensor("latents")), json.loads(file.metadata()["note"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
