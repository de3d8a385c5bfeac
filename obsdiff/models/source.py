"""A MODEL argument resolved: a diffusers folder, a hub id, or `fashion`, looked at before anything is loaded."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsdiff.errors import InputError
from obsdiff.files import read_json
from obsdiff.models import ModelSpec, find_spec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

DATA = Path(str(files("obsdiff") / "data"))
EMBEDDED = {"fashion": DATA / "fashion"}
UNSAFE = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
INFO = "obsdiff.json"  # what makes a diffusers folder a pruned checkpoint
MANIFEST = "manifest.json"  # what makes a folder a bundle


@dataclass(frozen=True)
class Source:
    """A pipeline folder that was looked at: its index, its denoiser's family and config, its generation defaults."""

    name: str
    path: Path
    index: Mapping[str, Any]
    spec: ModelSpec
    config: Mapping[str, Any]
    defaults: Mapping[str, Any]  # generation_config.json: what the pipeline should be called with unless told otherwise

    @property
    def denoiser_path(self) -> Path:
        return self.path / self.spec.component

    @property
    def null_components(self) -> dict[str, None]:
        """Components that the index calls null: diffusers insists on being told so again."""
        return {name: None for name, entry in self.index.items() if _is_component(entry) and entry[0] is None}

    @property
    def prompt_tokens(self) -> int:
        """How many tokens a prompt usually is to the denoiser. Raises InputError for a number that it cannot have."""
        tokens = self.defaults.get("prompt_tokens", self.spec.tokens[1])
        if not isinstance(tokens, int) or not 1 <= tokens <= self.spec.tokens[2]:
            raise InputError(
                f"{self.path / 'generation_config.json'}: prompt_tokens is {tokens!r}, "
                f"not a number from 1 to {self.spec.tokens[2]}"
            )
        return tokens

    @property
    def vae_scale(self) -> int:
        """Pixels per latent along each side."""
        config = self.path / "vae" / "config.json"
        return 2 ** (len(read_json(config).get("block_out_channels", ())) - 1) if config.exists() else 8


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2


def find_source(model: str | Path) -> Source:
    """Resolves a MODEL. Raises InputError that says what is wrong with it and what would be right."""
    path = EMBEDDED.get(str(model)) or Path(model)
    if not path.exists():
        path = _from_hub(str(model))
    if not path.is_dir():
        raise InputError(f"{model} is a file: a diffusers pipeline is a folder with a model_index.json")
    if (path / MANIFEST).exists():
        raise InputError(f"{model} is a bundle, the result of an export: a diffusers pipeline is needed here")
    if not (path / "model_index.json").exists():
        raise InputError(f"{model} is not a diffusers pipeline: it has no model_index.json")
    index = read_json(path / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise InputError(f"{path / 'model_index.json'} names no pipeline class of diffusers (_class_name)")
    spec = _find_family(index, model)
    source = Source(
        name=str(model),
        path=path,
        index=index,
        spec=spec,
        config=_read_object(path / spec.component / "config.json"),
        defaults=_read_object(defaults) if (defaults := path / "generation_config.json").exists() else {},
    )
    _check_weights(source)
    return source


def _find_family(index: Mapping[str, Any], model: str | Path) -> ModelSpec:
    for component in ("transformer", "unet"):
        entry: Any = index.get(component)
        if _is_component(entry) and entry[1]:
            return find_spec(str(entry[1]))
    raise InputError(f"{model}: its model_index.json names neither a transformer nor a unet, so nothing can be pruned")


def _check_weights(source: Source) -> None:
    """Every component with weights must have them as safetensors: pickles run code when they are opened."""
    for name, entry in source.index.items():
        folder = source.path / name
        if not _is_component(entry) or entry[0] is None:
            continue
        if not folder.is_dir():
            raise InputError(f"{source.name}: the component folder {name} is missing")
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE)
        if unsafe and not list(folder.glob("*.safetensors")):
            raise InputError(
                f"{folder / unsafe[0]} is a pickle, which can run code when it is opened: refused. "
                "Convert it to safetensors (diffusers: save_pretrained(..., safe_serialization=True))"
            )
    if not list(source.denoiser_path.glob("*.safetensors")):
        raise InputError(f"{source.denoiser_path} holds no .safetensors weights")


def _from_hub(model: str) -> Path:
    """A hub id's snapshot on disk, downloaded when it is not there yet; only safetensors and text files."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(f"{model} does not exist (and is no hub id such as owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{model} is no folder here and could not be fetched from the hub: {first}") from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences progress bars and notices of diffusers and transformers, which would tear our own display."""
    import diffusers
    import transformers

    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_pipeline(source: Source, dtype: Any = None, **components: Any) -> "DiffusionPipeline":
    """The source as a diffusers pipeline on the CPU; `components` take the place of those on disk.

    Raises InputError when the folder is truncated or foreign.
    """
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        try:
            pipe = DiffusionPipeline.from_pretrained(
                str(source.path),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                **{**source.null_components, **components},
            )
        except Exception as error:  # diffusers, transformers, tokenizers and safetensors each raise their own
            raise InputError(f"{source.name} cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_denoiser(source: Source, dtype: Any = None) -> "nn.Module":
    """The source's denoiser alone, on the CPU, in eval mode. Raises InputError as load_pipeline does."""
    import diffusers

    with quiet_libraries():
        try:
            denoiser = getattr(diffusers, source.spec.denoiser).from_pretrained(
                source.denoiser_path, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        except Exception as error:
            raise InputError(f"{source.denoiser_path} cannot be loaded: {_first_line(error)}") from error
    return denoiser.eval()


def meta_denoiser(source: Source) -> "nn.Module":
    """The denoiser's module on the meta device: shapes without memory."""
    import diffusers
    import torch

    with quiet_libraries(), torch.device("meta"):
        return getattr(diffusers, source.spec.denoiser).from_config(dict(source.config)).eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
