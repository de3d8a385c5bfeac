"""Pictures from a pipeline: the same options, seeds and files for every command that draws."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from obsdiff.errors import InputError
from obsdiff.files import read_json, sha256, whole
from obsdiff.models.source import EMBEDDED, INFO, MANIFEST


def call_options(pipe: Any, path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What to call the pipeline with: its folder's generation_config.json, then whatever override is not None.

    Options that this pipeline's __call__ does not take are left out.
    """
    config = EMBEDDED.get(str(path), Path(path)) / "generation_config.json"
    options = read_json(config) if config.exists() else {}
    if not isinstance(options, dict):
        raise InputError(f"{config} holds no JSON object: it should name options of the pipeline's call")
    options |= {name: value for name, value in (overrides or {}).items() if value is not None}
    known = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in options.items() if name in known}


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any], output_type: str = "pil"
) -> Any:
    """One picture a prompt, all in one batch; the noise of each comes from its own seed, whatever the batch.

    PIL images, or float32 [n, C, h, w] with output_type "pt" (0 to 1) or "latent".
    Raises InputError when the pipeline refuses an option.
    """
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise InputError(f"the seed {seed} is out of range: it must lie between 0 and 2**64 - 1")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = options.get("negative_prompt")
    extra = {"negative_prompt": [negative] * len(prompts)} if negative is not None else {}
    try:
        return pipe(list(prompts), **{**options, **extra}, generator=generators, output_type=output_type).images
    except ValueError as error:  # the pipelines' own argument checks
        raise InputError(str(error)) from None


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the picture with its metadata as text chunks."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    with whole(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def identity(path: str | Path) -> str:
    """What drew a picture: SHA-256 of the bundle's manifest or the checkpoint's recipe, or the model's name."""
    folder = Path(path)
    for name in (MANIFEST, INFO):
        if (folder / name).exists():
            return f"sha256:{sha256(folder / name)}"
    return str(path)


def output_paths(out: Path, count: int) -> list[Path]:
    """`x.png` is a file (several pictures: x-0.png, x-1.png), any other name a folder of 0.png, 1.png, ..."""
    if out.suffix.lower() == ".png":
        return [out] if count == 1 else [out.with_name(f"{out.stem}-{k}.png") for k in range(count)]
    return [out / f"{k}.png" for k in range(count)]
