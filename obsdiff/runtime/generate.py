"""Pictures from a pipeline: the same options, seeds and files for every command that draws."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from obsdiff.errors import InputError
from obsdiff.files import read_json, sha256, whole
from obsdiff.models import pipeline_spec
from obsdiff.models.source import EMBEDDED, INFO, MANIFEST

OTHER_IMAGES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def call_options(pipe: Any, path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What to call the pipeline with: its folder's generation_config.json, then whatever override is not None,
    and what its family insists on.

    Options that this pipeline's __call__ does not take are left out.
    """
    config = EMBEDDED.get(str(path), Path(path)) / "generation_config.json"
    options = read_json(config) if config.exists() else {}
    if not isinstance(options, dict):
        raise InputError(f"{config} holds no JSON object: it should name options of the pipeline's call")
    options |= {name: value for name, value in (overrides or {}).items() if value is not None}
    if spec := pipeline_spec(pipe):
        options = spec.options(options | dict(spec.call))
        if spec.negative_prompt is not None and options.get(spec.guidance, math.inf) > spec.guided_above:
            options.setdefault("negative_prompt", spec.negative_prompt)
    known = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in options.items() if name in known}


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any], output_type: str = "pil"
) -> Any:
    """One picture a prompt, all in one batch; the noise of each comes from its own seed, whatever the batch.

    PIL images, or float32 [n, C, h, w] with output_type "pt" (0 to 1) or "latent" (packed: [n, tokens, C]).
    Raises InputError when the pipeline refuses an option.
    """
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise InputError(f"the seed {seed} is out of range: it must lie between 0 and 2**64 - 1")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = options.get("negative_prompt")
    extra = {"negative_prompt": [negative] * len(prompts)} if negative is not None else {}
    spec = pipeline_spec(pipe)
    asked = spec.arguments(pipe, prompts) if spec and spec.arguments else {"prompt": list(prompts)}
    try:
        result = pipe(**asked, **{**options, **extra}, generator=generators, output_type=output_type)[0]
    except ValueError as error:  # the pipelines' own argument checks
        raise InputError(str(error)) from None
    return _first_frames(result, output_type)


def known_prompt(pipe: Any, prompt: str) -> str:
    """That prompt, or one that the pipeline understands where captions are no prompts to it."""
    spec = pipeline_spec(pipe)
    return spec.prompts[0] if spec and spec.prompts else prompt


def _first_frames(result: Any, output_type: str) -> Any:
    """Pictures, where a pipeline that draws videos gave frames."""
    if isinstance(result, torch.Tensor):
        return result if result.ndim < 5 else result[:, :, 0] if output_type == "latent" else result[:, 0]
    if isinstance(result, list):
        return [value[0] if isinstance(value, list) else value for value in result]
    return result


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
    """`x.png` is a file (several pictures: x-0.png, x-1.png), any other name a folder of 0.png, 1.png, ...

    Raises InputError for the name of another kind of picture: nobody means a folder by it.
    """
    if out.suffix.lower() in OTHER_IMAGES:
        raise InputError(f"--out {out}: pictures are written as PNG; name it {out.with_suffix('.png')}, or a folder")
    if out.suffix.lower() == ".png":
        return [out] if count == 1 else [out.with_name(f"{out.stem}-{k}.png") for k in range(count)]
    return [out / f"{k}.png" for k in range(count)]
