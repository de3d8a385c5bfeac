"""The base of a prune put together first: a single-file checkpoint laid out as a pipeline, LoRAs fused into it.

A LoRA that is fused into weights that are pruned already fills their zeros again, so it goes in before.
"""

import dataclasses
import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from obsdiff import checkpoint
from obsdiff.errors import InputError, first_line
from obsdiff.files import folder_files, folder_hash, sha256, write_tensors
from obsdiff.models.source import UNSAFE, Source, find_source, load_pipeline, quiet_libraries
from obsdiff.models.weights import check_floating

IN_FILE = {  # how single files begin the names of a component's tensors, by its class
    "Autoencoder": ("first_stage_model.", "vae."),
    "CLIPText": ("text_encoders.clip", "cond_stage_model.", "conditioner."),
    "T5": ("text_encoders.t5xxl.",),
}
DEFAULTS = "generation_config.json"
DECOMPOSED = ("dora_scale", "lora_magnitude_vector")  # which diffusers leaves out with a notice, or cannot fuse


class Lora(BaseModel):
    """One LoRA of a recipe: as it was named, how much of it is added, and the file's hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    scale: float
    sha256: str


def find_base(model: str | Path, config: str | Path | None) -> tuple[Source, dict[str, str]]:
    """The source that a prune of MODEL reads its config from, and what to record of the base.

    MODEL may be a single-file checkpoint when `config` is a pipeline (weights or none) of the same architecture.
    Raises InputError as find_source does.
    """
    if config is None:
        source = find_source(model)
        return source, {"name": source.name, "sha256": folder_hash(source.path)}
    file = Path(model)
    if not file.is_file() or file.suffix != ".safetensors":
        raise InputError(f"--config is for a single-file checkpoint (.safetensors), and {model} is none")
    check_floating(file)
    source = find_source(config, weights=False)
    record = {"name": str(model), "sha256": sha256(file), "config": source.name}
    return dataclasses.replace(source, name=str(model)), record | {"config_sha256": folder_hash(source.path)}


def parse_lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE] as a path and a scale, 1 unless given."""
    path, colon, scale = text.rpartition(":")
    try:
        value = float(scale) if colon else 1.0
    except ValueError:
        path, value = text, 1.0
    if not abs(value) < float("inf"):
        raise InputError(f"--lora {text}: the scale {scale} is no number to multiply with")
    return (path if colon and path else text), value


def find_lora(name: str) -> Path:
    """The file of a LoRA: a local .safetensors file, or a hub id (owner/name, or owner/name/file.safetensors).

    Raises InputError when it is none, a pickle, or of a kind that cannot be fused exactly.
    """
    path = Path(name)
    if path.suffix in UNSAFE:
        raise InputError(f"--lora {name}: a pickle, which can run code when it is opened: refused. Give .safetensors")
    if path.is_dir():
        raise InputError(f"--lora {name} is a folder: name the .safetensors file in it")
    if not path.exists():
        path = _from_hub(name)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"--lora {name} is truncated or is not safetensors: {error}") from None
    if any(part in key for key in names for part in DECOMPOSED):
        raise InputError(f"--lora {name} is a DoRA, which diffusers cannot fuse into this pipeline: give a plain LoRA")
    if not any("lora" in key for key in names):
        raise InputError(f"--lora {name} holds no LoRA: none of its tensors is called so")
    return path


def _from_hub(name: str) -> Path:
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository or owner in (".", "..", "~"):
        raise InputError(f"--lora {name} does not exist (and is no hub id such as owner/name)")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=[file or "*.safetensors"]))
    except Exception as error:  # the hub's, the network's and the validator's share no base class
        raise InputError(
            f"--lora {name} is no file here and could not be fetched from the hub: {first_line(error)}"
        ) from None
    found = [folder / file] if file else sorted(folder.glob("*.safetensors"))
    if len(found) != 1 or not found[0].is_file():
        there = ", ".join(path.name for path in found) or "none"
        raise InputError(f"--lora {name}: name one of its .safetensors files, owner/name/FILE ({there})")
    return found[0]


def record_loras(texts: Sequence[str]) -> tuple[Lora, ...]:
    """What a recipe keeps of `--lora PATH[:SCALE]`, every one of them looked at."""
    if texts:
        check_peft()
    pairs = [parse_lora(text) for text in texts]
    return tuple(Lora(name=name, scale=scale, sha256=sha256(find_lora(name))) for name, scale in pairs)


def assemble(source: Source, config: bool, loras: Sequence[Lora], folder: Path) -> Source:
    """The source with its LoRAs fused in, in `folder`; with `config` its name is a file whose weights it gets.

    What is there already is taken: it is renamed to its name only when it is whole. Tensors keep their stored dtypes.
    Raises InputError when the file or a LoRA does not fit the pipeline, or a package that is needed is missing.
    """
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with quiet_libraries():
            pipe = load_single_file(source) if config else load_pipeline(source, _dtype(source))
            for lora in loras:
                fuse(pipe, find_lora(lora.name), lora)
            if config:
                pipe.save_pretrained(part)
                if (source.path / DEFAULTS).exists():
                    shutil.copyfile(source.path / DEFAULTS, part / DEFAULTS)
            else:
                _write_fused(source, pipe, loras, part)
        part.rename(folder)
    return dataclasses.replace(source, path=folder)


def load_single_file(source: Source) -> Any:
    """A single-file checkpoint as a pipeline, by diffusers' own conversion; what it lacks is the config folder's."""
    import diffusers

    stored = checkpoint.TensorFiles([Path(source.name)])
    kinds = {tensor.dtype for tensor in stored.values()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    components: dict[str, Any] = dict(source.null_components)
    try:
        for folder in source.component_folders:  # diffusers itself does not look for them beside the configs
            library, name = source.index[folder.name]
            begin = next((keys for prefix, keys in IN_FILE.items() if name.startswith(prefix)), ())
            held = folder.name == source.spec.component or any(key.startswith(begin) for key in stored)
            if not held and library in ("diffusers", "transformers") and list(folder.glob("*.safetensors")):
                component = getattr(importlib.import_module(library), name)
                components[folder.name] = component.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        return getattr(diffusers, source.index["_class_name"]).from_single_file(
            source.name, config=str(source.path), dtype=dtype, local_files_only=True, **components
        )
    except Exception as error:  # whatever a conversion raises for keys that it did not expect
        raise InputError(f"{source.name} is no single-file {source.spec.title}: {first_line(error)}") from None


def check_peft() -> None:
    """Raises InputError when the package is missing through which diffusers reads and fuses LoRAs."""
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        raise InputError('--lora needs the package peft: pip install "obsdiff[lora]"')


def fuse(pipe: Any, path: Path, lora: Lora) -> None:
    """Adds scale times the LoRA to the pipeline's weights, by diffusers and peft."""
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"--lora {lora.name}: diffusers loads no LoRA into a {type(pipe).__name__}")
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True, use_safetensors=True)
        parts = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None]
        pipe.fuse_lora(components=parts, lora_scale=lora.scale)
        pipe.unload_lora_weights()
    except Exception as error:  # of diffusers, peft and safetensors alike
        raise InputError(f"--lora {lora.name} does not fit this pipeline: {first_line(error)}") from None


def _dtype(source: Source) -> torch.dtype:
    kinds = {tensor.dtype for tensor in checkpoint.denoiser_weights(source.denoiser_path).values()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _write_fused(source: Source, pipe: Any, loras: Sequence[Lora], out: Path) -> None:
    """Writes the fused weights in the shards and dtypes of the source; all else is a link to the source's files."""
    stored = checkpoint.denoiser_weights(source.denoiser_path)
    fused = pipe.components[source.spec.component].state_dict()
    changed = False
    for file in stored.files:
        with safe_open(file, framework="pt") as opened:
            old = {name: opened.get_tensor(name) for name in opened.keys()}
            new = {name: fused[name].to(tensor.dtype) if name in fused else tensor for name, tensor in old.items()}
            changed = changed or any(not torch.equal(new[name], tensor) for name, tensor in old.items())
            (out / source.spec.component).mkdir(exist_ok=True)
            write_tensors(out / source.spec.component / file.name, new, opened.metadata())
    encoders = [name for name in pipe.components if name.startswith("text_encoder") and _encodes(loras)]
    if not changed and not encoders:
        raise InputError(f"--lora {loras[-1].name} changes no weight of the {source.spec.denoiser}: of another model?")
    for name in encoders:
        if pipe.components[name] is not None:
            pipe.components[name].save_pretrained(out / name)
    for name, path in folder_files(source.path).items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() and not (path.suffix == ".safetensors" and name.split("/")[0] in encoders):
            target.symlink_to(path.resolve())


def _encodes(loras: Sequence[Lora]) -> bool:
    """Whether some LoRA has a part for a text encoder, in diffusers' or kohya's names."""
    return any(
        "text_encoder" in key or key.startswith("lora_te")
        for lora in loras
        for key in checkpoint.TensorFiles([find_lora(lora.name)])
    )
