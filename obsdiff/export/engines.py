"""Engines: compiled for one kind of machine, found by their key, built anew where none fits.

A format is a module of this folder with five functions:

    check(options, device, precision)                    InputError: it cannot be made here; before anything is loaded
    make_key(manifest, options, device) -> EngineKey     of what `build` would make here; InputError: it cannot be made
    misfit(key, device) -> str                           why an engine does not run on the device, "" where it does
    build(bundle, manifest, key, out, progress)          writes the engine; ObsdiffError with what stood in the way
    open_engine(path, manifest, key, device, bundle) -> denoise   loads one that fits; `bundle` has the weights

`bundle` is a folder whose manifest lists no engine of this format yet. Engines that are built where a bundle is loaded
go to the user's cache, since a bundle is never changed by looking at it.
"""

import contextlib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest
from obsdiff.export.schema import EngineFormat, EngineKey, EngineOptions, Precision
from obsdiff.files import cache_folder, read_json, sha256, whole, write_json
from obsdiff.progress import Progress

Denoise = Callable[..., Tensor]

FORMATS: dict[EngineFormat, str] = {
    "tensorrt": "obsdiff.export.tensorrt",
    "tensorrt-rtx": "obsdiff.export.tensorrt_rtx",
    "torch-tensorrt": "obsdiff.export.torch_tensorrt",
    "aoti": "obsdiff.export.aoti",
}
OPTIONS: dict[EngineFormat, tuple[str, ...]] = {
    "tensorrt": ("sm", "sparse", "refit", "weight_streaming", "version_compatible", "hardware_compatible"),
    "tensorrt-rtx": ("sm", "sparse", "refit", "weight_streaming"),
    "torch-tensorrt": ("sparse",),
    "aoti": (),
}
"""What a format heeds of EngineOptions."""
NEED_GRAPH = ("tensorrt", "tensorrt-rtx")  # compiled from the ONNX file; the others from the module
NATIVE = ("torch-tensorrt", "aoti")  # machine code or a program that torch runs as it is


class Format(Protocol):
    def check(self, options: EngineOptions, device: str, precision: Precision) -> object: ...
    def make_key(self, manifest: Manifest, options: EngineOptions, device: str) -> EngineKey: ...
    def misfit(self, key: EngineKey, device: str) -> str: ...
    def build(self, bundle: Path, manifest: Manifest, key: EngineKey, out: Path, progress: Progress) -> None: ...
    def open_engine(self, path: Path, manifest: Manifest, key: EngineKey, device: str, bundle: Path) -> Denoise: ...


def load_format(name: str) -> Format:
    return cast(Format, importlib.import_module(FORMATS[cast(EngineFormat, name)]))


def parse_options(sm: str | None, **options: bool) -> EngineOptions:
    """Options from the command line, `sm` as in "86,89" or "8.6". Raises InputError for one that is no number."""
    names = [name.strip().replace(".", "").removeprefix("sm_") for name in (sm or "").split(",")] if sm else []
    if bad := [name for name in names if not re.fullmatch(r"\d{2,3}", name)]:
        raise InputError(f"--sm {sm}: {bad[0]!r} is no compute capability, such as 86 or 86,89")
    return EngineOptions(sm=tuple(dict.fromkeys(names)), **options)


def heeded(name: str, options: EngineOptions) -> EngineOptions:
    """The options with those at their defaults that the format does not heed."""
    return EngineOptions(**{option: getattr(options, option) for option in OPTIONS[cast(EngineFormat, name)]})


def check_options(names: Sequence[str], options: EngineOptions, device: str, precision: Precision) -> None:
    """Raises InputError for an option that none of the formats heeds, and for a format that cannot be built here."""
    asked = [name for name, value in options if value != EngineOptions.model_fields[name].default]
    for option in asked:
        able = [name for name, options in OPTIONS.items() if option in options]
        if not {*able} & {*names}:
            raise InputError(f"--{option.replace('_', '-')} is for --format {' or '.join(able)}")
    for name in names:
        load_format(name).check(heeded(name, options), device, precision)


def runs_code(key: EngineKey) -> bool:
    """Whether loading the engine runs code that is in it: then it is not taken from strangers unasked."""
    return key.format in NATIVE or key.options.version_compatible


def find_engine(name: str, bundle: Path, manifest: Manifest, device: str) -> tuple[EngineKey, Path] | str:
    """The engine of the bundle, or of the cache, that runs on the device; or why there is none."""
    form = load_format(name)
    reasons = []
    for engine in manifest.engines:
        if engine.key.format == name:
            if not (reason := form.misfit(engine.key, device)):
                return engine.key, bundle / engine.path
            reasons.append(reason)
    key = form.make_key(manifest, _options(name, manifest), device)
    if reason := form.misfit(key, device):  # TensorRT-RTX builds for others on a machine without a GPU
        return reason
    path = cache_folder("engines") / key.file
    record = path.with_name(f"{path.name}.json")
    if path.exists() and record.exists():
        if read_json(record).get("sha256") == sha256(path):
            return key, path
        reasons.append(f"{path} is not the engine that was built, its SHA-256 differs")
    return reasons[0] if reasons else "the bundle has none"


def open_engine(
    name: str, bundle: Path, manifest: Manifest, device: str, *, build: bool = True, progress: Progress | None = None
) -> Denoise:
    """The engine that fits the device, loaded; built into the user's cache where there is none and `build` allows it.

    Raises InputError when there is none and none may or can be built, ObsdiffError when building or loading fails.
    """
    form = load_format(name)
    found = find_engine(name, bundle, manifest, device)
    if isinstance(found, str):
        if not build:
            raise InputError(
                f"{bundle} has no {name} engine for {device} ({found}), and --no-build forbids to build one"
            )
        key = form.make_key(manifest, _options(name, manifest), device)
        if reason := form.misfit(key, device):
            raise InputError(f"--backend {name} does not run on {device}: {reason}")
        found = key, build_cached(form, bundle, manifest, key, progress or Progress())
    key, path = found
    return form.open_engine(path, manifest, key, device, bundle)


def build_cached(form: Format, bundle: Path, manifest: Manifest, key: EngineKey, progress: Progress) -> Path:
    """Builds the engine into the user's cache and returns its path."""
    folder = cache_folder("engines")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key.file
    progress.message(f"building the {key.format} engine for {key.target}: kept in {folder}")
    with whole(path) as part:
        form.build(bundle, manifest, key, part, progress)
    mark_built(path)
    write_json(path.with_name(f"{path.name}.json"), {"key": key.model_dump(mode="json"), "sha256": sha256(path)})
    return path


def _options(name: str, manifest: Manifest) -> EngineOptions:
    """What the bundle's own engine of the format was asked to be, but for the machine at hand."""
    own = [engine.key.options for engine in manifest.engines if engine.key.format == name]
    return own[-1].model_copy(update={"sm": ()}) if own else EngineOptions()


def mark_built(path: Path) -> None:
    """Remembers that this user built the engine: one that runs as machine code is not taken from others unasked."""
    folder = cache_folder("built")
    with contextlib.suppress(OSError):  # without a cache the engine is a stranger's to this user, and no worse
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sha256(path)).touch()


def was_built_here(path: Path) -> bool:
    return (cache_folder("built") / sha256(path)).exists()
