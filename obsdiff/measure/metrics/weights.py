"""Weights of metrics: found on this machine or named, with where to get them. Nothing is downloaded."""

from pathlib import Path

from obsdiff.errors import InputError


class Missing(Exception):
    """A metric cannot run here; the message says what it needs and where that is."""


def installed(module: str, package: str) -> None:
    """Raises Missing that says what to install, or why it does not import."""
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise Missing(f"{package} does not import here: {error}") from None
        raise Missing(f"{package} is not installed: pip install {package}") from None
    except Exception as error:  # whatever a package of another time raises
        raise Missing(f"{package} does not import here: {error}") from None


def find_file(given: Path | None, name: str, where: str) -> Path:
    """The file given, the one of that name in the folder given, or in torch's hub cache. Raises Missing."""
    import torch

    if given is not None:
        path = given / name if given.is_dir() else given
        if not path.is_file():
            raise InputError(f"--weights: {path} is not there")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise Missing(f"{path} is missing: get it from {where}, or name it with --weights METRIC=PATH")
    return path


def find_hub_file(given: Path | None, repo: str, name: str) -> Path:
    """The file given, the one of that name in the folder given, or in the hub cache. Raises Missing."""
    from huggingface_hub import try_to_load_from_cache

    if given is not None:
        return find_file(given, name, repo)
    found = try_to_load_from_cache(repo, name)
    if not isinstance(found, str):
        raise Missing(f"{name} is missing: get it with `hf download {repo} {name}`, or use --weights METRIC=PATH")
    return Path(found)


def find_model(given: Path | None, repo: str) -> Path:
    """A folder with a model of transformers as safetensors: the one given, or the hub cache's. Raises Missing."""
    folder = given or find_hub_file(None, repo, "config.json").parent
    if not (folder / "config.json").is_file():
        raise InputError(f"--weights: {folder} is no folder of a transformers model: it has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise Missing(f"{folder} has no .safetensors weights, and pickles are refused: get them from {repo}")
    return folder
