"""A MODEL argument resolved: a diffusers folder, a hub id, or `fashion`, looked at before anything is loaded."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsdiff.errors import InputError, first_line
from obsdiff.files import read_json
from obsdiff.models import ModelSpec, find_spec, size_of
from obsdiff.models.weights import FULL_PRECISION, check_floating, check_whole, lone_variant

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
    def component_folders(self) -> list[Path]:
        """The folders of the components that the index names."""
        return [self.path / name for name, entry in self.index.items() if _is_component(entry) and entry[0] is not None]

    @property
    def variant(self) -> str | None:
        """The variant of the denoiser's weights (fp16) where it has no plain ones. Raises InputError for several."""
        return lone_variant(self.denoiser_path)

    @property
    def pipeline_variant(self) -> str | None:
        """The variant that some component has alone, None when all have plain weights; diffusers takes one for all."""
        found = {variant: folder for folder in self.component_folders if (variant := lone_variant(folder))}
        if len(found) > 1:
            where = " and ".join(f"{folder.name} only {variant}" for variant, folder in found.items())
            raise InputError(f"{self.name}: no variant of the weights is there for all components: {where}")
        return next(iter(found), None)

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
    def side_step(self) -> int:
        """Pixels that a picture's sides must be multiples of."""
        return self.vae_scale * size_of(self.spec.patch, self.config)

    @property
    def vae_scale(self) -> int:
        """Pixels per latent along each side."""
        path = self.path / "vae" / "config.json"
        config = read_json(path) if path.exists() else {}
        if isinstance(config.get("scale_factor_spatial"), int):
            return int(config["scale_factor_spatial"])
        for key, extra in (("block_out_channels", -1), ("encoder_block_out_channels", -1), ("temperal_downsample", 0)):
            if key in config:
                return 2 ** (len(config[key]) + extra)
        return 8


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2


def find_source(model: str | Path, weights: bool = True) -> Source:
    """Resolves a MODEL; with `weights` False one that needs none, its configs being all that is wanted.

    Raises InputError that says what is wrong with it and what would be right.
    """
    path = EMBEDDED.get(str(model)) or Path(model)
    if not path.exists():
        path = _from_hub(str(model))
    if not path.is_dir():
        raise InputError(_say_file(path))
    if (path / MANIFEST).exists():
        raise InputError(f"{model} is a bundle, the result of an export: a diffusers pipeline is needed here")
    if not (path / "model_index.json").exists():
        raise InputError(f"{model} is not a diffusers pipeline: it has no model_index.json")
    index = read_json(path / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise InputError(f"{path / 'model_index.json'} names no pipeline class of diffusers (_class_name)")
    spec = _find_family(index, model, path)
    source = Source(
        name=str(model),
        path=path,
        index=index,
        spec=spec,
        config=_read_object(path / spec.component / "config.json"),
        defaults=_read_object(defaults) if (defaults := path / "generation_config.json").exists() else {},
    )
    _check_config(source)
    if weights:
        _check_weights(source)
    return source


def _say_file(path: Path) -> str:
    """What to do with a file where a folder is needed."""
    if path.suffix in UNSAFE:
        return f"{path} is a pickle, which can run code when it is opened: refused"
    if path.suffix == ".gguf":
        return f"{path} is quantised (GGUF): {FULL_PRECISION} it was made from"
    what = f"{path} is a file: a diffusers pipeline is a folder with a model_index.json"
    if path.suffix != ".safetensors":
        return what
    return f"{what}; a single-file checkpoint can be pruned with --config MODEL, a pipeline of the same architecture"


def _find_family(index: Mapping[str, Any], model: str | Path, path: Path) -> ModelSpec:
    for component in ("transformer", "unet"):
        entry: Any = index.get(component)
        if _is_component(entry) and entry[1]:
            config = path / component / "config.json"
            spec = find_spec(str(entry[1]), _read_object(config) if config.exists() else None, component)
            if twins := [name for name, other in index.items() if name != component and other == entry]:
                raise InputError(
                    f"{model} has several denoisers ({component}, {', '.join(twins)}) that take turns: "
                    "obsdiff prunes and exports pipelines that have one"
                )
            if spec.pipelines and (kind := index["_class_name"]) not in spec.pipelines:
                raise InputError(f"{model} is a {kind}: of its family obsdiff takes {', '.join(spec.pipelines)}")
            return spec
    raise InputError(f"{model}: its model_index.json names neither a transformer nor a unet, so nothing can be pruned")


def _check_config(source: Source) -> None:
    where = source.denoiser_path / "config.json"
    try:
        patch = size_of(source.spec.patch, source.config)
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise InputError(f"{where} is not of a {source.spec.denoiser}: {error}") from None
    if patch < 1:
        raise InputError(f"{where} is not of a {source.spec.denoiser}: patches of {patch} latents")
    if quantised := source.config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{source.denoiser_path} is quantised ({method}): {FULL_PRECISION} it was made from")


def _check_weights(source: Source) -> None:
    """Every component with weights must have them as safetensors: pickles run code when they are opened."""
    for folder in source.component_folders:
        if not folder.is_dir():
            raise InputError(f"{source.name}: the component folder {folder.name} is missing")
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE)
        if unsafe and not list(folder.glob("*.safetensors")):
            raise InputError(
                f"{folder / unsafe[0]} is a pickle, which can run code when it is opened: refused. "
                "Convert it to safetensors (diffusers: save_pretrained(..., safe_serialization=True))"
            )
        check_whole(folder)
    if gguf := sorted(source.denoiser_path.glob("*.gguf")):
        raise InputError(_say_file(gguf[0]))
    if not list(source.denoiser_path.glob("*.safetensors")):
        raise InputError(f"{source.denoiser_path} holds no .safetensors weights")
    check_floating(*sorted(source.denoiser_path.glob("*.safetensors")))
    _ = source.pipeline_variant  # more than one is an error


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
    variant = source.pipeline_variant
    if variant != source.variant and source.spec.component not in components:
        components[source.spec.component] = load_denoiser(source, dtype)
    with quiet_libraries():
        try:
            pipe = _pipeline_class(source).from_pretrained(
                str(source.path),
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                **{**source.null_components, **components},
            )
        except Exception as error:  # diffusers, transformers, tokenizers and safetensors each raise their own
            raise InputError(f"{source.name} cannot be loaded: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if source.spec.component not in components:
        _check_complete(source, pipe.components[source.spec.component])
    return pipe


def _pipeline_class(source: Source) -> "type[DiffusionPipeline]":
    """The class that the index names: called through the base class, diffusers 0.42 forgets components that the class
    itself has as optional and that were passed to it."""
    import diffusers

    named = getattr(diffusers, source.index["_class_name"], None)
    if isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline):
        return named
    return diffusers.DiffusionPipeline


def load_denoiser(source: Source, dtype: Any = None) -> "nn.Module":
    """The source's denoiser alone, on the CPU, in eval mode. Raises InputError as load_pipeline does."""
    import diffusers

    with quiet_libraries():
        try:
            denoiser = getattr(diffusers, source.spec.denoiser).from_pretrained(
                source.denoiser_path, dtype=dtype, variant=source.variant, use_safetensors=True, local_files_only=True
            )
        except Exception as error:
            raise InputError(f"{source.denoiser_path} cannot be loaded: {first_line(error)}") from error
    _check_complete(source, denoiser)
    return denoiser.eval()


def _check_complete(source: Source, denoiser: "nn.Module") -> None:
    """diffusers leaves a parameter that no file holds without memory, and says so in a notice only."""
    if missing := next((name for name, parameter in denoiser.named_parameters() if parameter.is_meta), None):
        raise InputError(f"{source.denoiser_path} cannot be loaded: its weights lack {missing}")


def meta_denoiser(source: Source) -> "nn.Module":
    """The denoiser's module on the meta device: shapes without memory. Raises InputError when its config is not one."""
    import diffusers
    import torch

    with quiet_libraries(), torch.device("meta"):
        try:
            return getattr(diffusers, source.spec.denoiser).from_config(dict(source.config)).eval()
        except Exception as error:  # whatever a constructor raises for sizes that it did not expect
            config = f"{source.denoiser_path}: its config.json is not of a {source.spec.denoiser}"
            raise InputError(f"{config}: {first_line(error)}") from None
