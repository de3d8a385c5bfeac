"""Weight files of a component: plain ones or a variant (`diffusion_pytorch_model.fp16.safetensors`); their dtypes."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from obsdiff.errors import InputError
from obsdiff.files import read_json, write_json

NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[^.]+))?\.json)?"
)
FLOATING = ("F64", "F32", "F16", "BF16")
FULL_PRECISION = (
    "pruning and export need the weights in full precision (float32, bfloat16, float16): take the model that"
)


def lone_variant(folder: Path) -> str | None:
    """The variant of the component's weights when there is no plain file, and None when there is.

    Raises InputError when there are several variants and no plain file: which one is meant cannot be told.
    """
    found = {match["variant"] or match["of_index"] for match in _matches(folder)}
    if None in found or not found:
        return None
    if len(found) > 1:
        names = ", ".join(sorted(name for name in found if name))
        raise InputError(f"{folder} holds the variants {names} and no plain weights: leave one of them there")
    return found.pop()


def _matches(folder: Path) -> list[re.Match[str]]:
    return [match for path in sorted(folder.glob("*")) if (match := NAME.fullmatch(path.name))]


def with_variant(name: str, variant: str | None) -> str:
    """A plain file's name as diffusers and transformers write it for a variant: before the last suffix."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def make_plain(folder: Path) -> None:
    """Renames a lone variant's files to the plain names, so that nobody has to ask for it by name."""
    variant = lone_variant(folder)
    if not variant:
        return
    for match in _matches(folder):
        path = folder / match.string
        if match["of_index"] or path.suffix == ".json":
            index = read_json(path)
            index["weight_map"] = {k: v.replace(f".{variant}", "", 1) for k, v in index["weight_map"].items()}
            write_json(path, index)
        path.rename(folder / match.string.replace(f".{variant}", "", 1))


def check_whole(folder: Path) -> None:
    """Raises InputError that names the first .safetensors file of the folder that is cut off or something else."""
    for path in sorted(folder.glob("*.safetensors")):
        tensor_names(path)


def tensor_names(path: Path) -> list[str]:
    """The names in a .safetensors file. Raises InputError when it is missing, cut off, or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or is not safetensors: {error}") from None


def check_floating(*paths: Path) -> None:
    """Raises InputError when a weight in these files is stored as integers or in 8 or 4 bits: it was quantised.

    Different floating types may stand side by side. Files that cannot be read are left for whoever loads them.
    """
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("weight")}
        except (SafetensorError, OSError):
            continue
        for name, kind in kinds.items():
            if kind not in FLOATING:
                raise InputError(f"{path} is quantised ({name} is stored as {kind}): {FULL_PRECISION} it was made from")
