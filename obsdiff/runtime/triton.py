"""A model repository for Triton Inference Server around a bundle, written whole or not at all.

REPO/<name>/config.pbtxt          what the model takes and gives, how it is batched, where its bundle is
REPO/<name>/1/model.py            hands Triton's Python backend obsdiff.runtime.triton_model
REPO/<name>/1/bundle/             the bundle, where it is copied
REPO/<name>-denoiser/config.pbtxt, 1/model.onnx     the denoiser alone, for Triton's ONNX Runtime backend
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from obsdiff import __version__
from obsdiff.errors import InputError
from obsdiff.export.bundle import GRAPH, Manifest, open_bundle
from obsdiff.export.schema import Tensor
from obsdiff.files import copy_files, folder_files
from obsdiff.progress import Progress
from obsdiff.runtime.backends import check_name

CONFIG = "config.pbtxt"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DEVICE = re.compile(r"cpu|cuda(?::([0-9]{1,3}))?")
DELAY = 5000  # microseconds that a request waits for others to be drawn with
QUEUE = 128  # requests that wait; Triton answers one more with 503
INPUTS = {
    "prompt": "TYPE_STRING",
    "seed": "TYPE_INT64",
    "negative_prompt": "TYPE_STRING",
    "steps": "TYPE_INT64",
    "guidance_scale": "TYPE_FP32",
    "height": "TYPE_INT64",
    "width": "TYPE_INT64",
}
REQUIRED = ("prompt", "seed")
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
MODEL = f'''"""Written by obsdiff {__version__}. {CONFIG} names the bundle; Triton's Python needs obsdiff installed."""

from obsdiff.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Word(str):
    """A value that a text proto writes without quotes: the name of an enumeration's member."""

    __slots__ = ()


def write_repository(
    bundle: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    instances: int = 1,
    backend: str = "auto",
    device: str | None = None,
    max_batch_size: int | None = None,
    copy: bool = False,
    denoiser: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Writes REPO/<name> (and with `denoiser` REPO/<name>-denoiser) and returns what was written, a record a model.

    The bundle is named by its absolute path, or put into the repository with `copy`; its denoiser's graph is always
    copied. `max_batch_size` counts pictures. `force` replaces models of these names.
    Raises InputError when the bundle, a name or an option is wrong; then nothing is written.
    """
    folder, repo, progress = Path(bundle), Path(repository), progress or Progress()
    name = name if name is not None else folder.resolve().name
    if not NAME.fullmatch(name):
        raise InputError(f"the model name {name!r} must be letters, digits, dots, dashes and underscores: give --name")
    _check_options(backend, device, instances)
    targets = {name: repo / name} | ({f"{name}-denoiser": repo / f"{name}-denoiser"} if denoiser else {})
    _check_targets(targets, folder, repo, force)
    with progress.task("verifying", 2):
        manifest = open_bundle(folder)
        if "onnx" not in manifest.formats and (denoiser or backend == "onnxruntime"):
            raise InputError(f"{folder} has no ONNX graph: export it with --format onnx")
        group = _instances(instances, device)
        parameters = {"bundle": "bundle" if copy else str(folder.resolve()), "backend": backend}
        parameters |= {"device": "cpu"} if device == "cpu" else {}
        configs = {name: pipeline_config(name, batch_limit(manifest, max_batch_size), group, parameters)}
        if denoiser:
            configs[f"{name}-denoiser"] = denoiser_config(f"{name}-denoiser", manifest, group)
        progress.advance(1, "writing")
        with _replacing(repo, targets) as parts:
            version = parts[name] / "1"
            if copy:
                copy_files(folder, version / "bundle")
            (version / "model.py").write_text(MODEL, encoding="utf-8")
            if denoiser:
                _copy_graph(folder, parts[f"{name}-denoiser"] / "1")
            for model, config in configs.items():
                _write_config(parts[model] / CONFIG, config)
    return [
        {
            "name": model,
            "folder": str(targets[model]),
            "backend": config["backend"],
            "max_batch_size": config["max_batch_size"],
            "bytes": sum(path.stat().st_size for path in folder_files(targets[model]).values()),
        }
        for model, config in configs.items()
    ]


def pipeline_config(
    name: str, max_batch_size: int, group: Mapping[str, Any], parameters: Mapping[str, str]
) -> dict[str, Any]:
    """The model that draws: a prompt and a seed in, a picture out, a row each for every picture."""
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": max_batch_size,
        "input": [
            {"name": entry, "data_type": Word(kind), "dims": [1], "optional": entry not in REQUIRED}
            for entry, kind in INPUTS.items()
        ],
        "output": [{"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [-1, -1, 3]}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": DELAY,
            "default_queue_policy": {"max_queue_size": QUEUE, "allow_timeout_override": True},
        },
        "instance_group": [group],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }


def denoiser_config(name: str, manifest: Manifest, group: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser alone, by the manifest's signature. Raises InputError for a dtype that Triton's backend has not."""
    tensors = (*manifest.inputs, *manifest.outputs)
    if odd := sorted({entry.dtype for entry in tensors} - set(TYPES)):
        raise InputError(f"--denoiser: Triton's ONNX Runtime backend does not take {odd[0]}")
    batched = all(entry.axes and entry.axes[0] == "batch" for entry in tensors)
    return {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": manifest.axes["batch"].max if batched else 0,
        "input": [_signature(entry, batched) for entry in manifest.inputs],
        "output": [_signature(entry, batched) for entry in manifest.outputs],
        **({"dynamic_batching": {"max_queue_delay_microseconds": DELAY}} if batched else {}),
        "instance_group": [group],
    }


def batch_limit(manifest: Manifest, asked: int | None) -> int:
    """How many pictures a batch may have: what is asked, or the most that the bundle draws with guidance."""
    limit = manifest.max_batch
    if limit is None:
        return asked or 8
    if asked is not None and asked > limit:
        pictures = f"{limit} picture{'s' * (limit > 1)} at once"
        raise InputError(f"--max-batch-size {asked}: the bundle was exported for {pictures}")
    return asked or limit


def pbtxt(message: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The lines of a message in protobuf's text format: mappings are messages, lists are repeated fields."""
    for key, value in message.items():
        entries = value if isinstance(value, list) else [value]
        if entries and all(isinstance(entry, int) for entry in entries) and isinstance(value, list):
            yield f"{indent}{key}: [ {', '.join(map(str, entries))} ]"
            continue
        for entry in entries:
            if isinstance(entry, Mapping):
                yield f"{indent}{key} {{"
                yield from pbtxt(entry, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{key}: {_scalar(entry)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value, ensure_ascii=False)  # true, 5 and "a\"b" are written alike in both languages


def _signature(entry: Tensor, batched: bool) -> dict[str, Any]:
    axes = [axis if isinstance(axis, int) else -1 for axis in entry.axes[batched:]]
    shape: dict[str, Any] = (
        {"dims": axes} if axes else {"dims": [1], "reshape": {}}
    )  # Triton has no dims without a number
    return {"name": entry.name, "data_type": Word(TYPES[entry.dtype]), **shape}


def _instances(count: int, device: str | None) -> dict[str, Any]:
    """Triton's instance group; `cuda` alone means so many instances on every GPU."""
    kind = "KIND_AUTO" if device is None else "KIND_CPU" if device == "cpu" else "KIND_GPU"
    _, _, index = (device or "").partition(":")
    return {"count": count, "kind": Word(kind), **({"gpus": [int(index)]} if index else {})}


def _check_options(backend: str, device: str | None, instances: int) -> None:
    check_name(backend)
    if device is not None and not DEVICE.fullmatch(device):
        raise InputError(f"--device {device}: it must be cpu, cuda, or cuda:1 and the like")
    if instances < 1:
        raise InputError(f"--instances {instances}: there must be at least one")


def _check_targets(targets: Mapping[str, Path], bundle: Path, repo: Path, force: bool) -> None:
    if repo.exists() and not repo.is_dir():
        raise InputError(f"{repo} is a file: choose another name")
    inside = bundle.resolve()
    if repo.resolve().is_relative_to(inside):
        raise InputError(f"{repo} is inside the bundle: choose another folder")
    for target in targets.values():
        if inside.is_relative_to(target.resolve()):
            raise InputError(f"the bundle {bundle} is inside {target}, which would be replaced: choose another --name")
        if target.is_symlink() or (target.exists() and not (target / CONFIG).is_file()):
            raise InputError(f"{target} exists and is no model of Triton: choose another --name")
        if target.exists() and not force:
            raise InputError(f"{target} exists already: choose another --name, or pass --force to replace it")


@contextlib.contextmanager
def _replacing(repo: Path, targets: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Folders to write each model in, which take their places together when the body ends well, and vanish if not."""
    made = next((path for path in reversed([repo, *repo.parents]) if not path.exists()), None)
    repo.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".obsdiff-", dir=repo))  # hidden, and on the file system of the targets
    try:
        parts = {name: work / name for name in targets}
        for part in parts.values():
            (part / "1").mkdir(parents=True)
        yield parts
        for name, target in targets.items():
            if target.exists():
                target.rename(work / f"{name}.replaced")
        for name, target in targets.items():
            parts[name].rename(target)
    except BaseException:
        for name, target in targets.items():
            old = work / f"{name}.replaced"
            if old.exists():
                shutil.rmtree(target, ignore_errors=True)
                old.rename(target)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if made and not any(repo.iterdir()):
            shutil.rmtree(made)


def _copy_graph(bundle: Path, version: Path) -> None:
    for path in folder_files((bundle / GRAPH).parent).values():
        if path.name.startswith(Path(GRAPH).name):  # with its external data
            shutil.copyfile(path, version / path.name)


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    try:
        path.write_text("\n".join(pbtxt(config)) + "\n", encoding="utf-8")
    except UnicodeEncodeError:
        raise InputError("the bundle's path is not valid Unicode: rename it, or pass --copy") from None
