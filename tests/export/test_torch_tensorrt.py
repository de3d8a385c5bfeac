"""Torch-TensorRT's format, as far as a machine without it goes: its arguments, its keys, what is refused."""

import inspect
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import torch_tensorrt
from obsdiff.export.bundle import WEIGHTS, Manifest, open_bundle
from obsdiff.export.schema import EngineKey, EngineOptions
from obsdiff.export.stage import export
from obsdiff.models.graph import random_inputs
from obsdiff.progress import Progress
from obsdiff.runtime.backends import load_backend
from obsdiff.runtime.pipeline import bundle_source


class FakeInput:
    """torch_tensorrt.Input of 2.13, as far as its checks go."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        assert not args
        ranged = all(name in kwargs for name in ("min_shape", "opt_shape", "max_shape"))
        assert ("shape" in kwargs) != ranged
        self.__dict__.update(kwargs)


def compile_213(  # the names of torch_tensorrt.dynamo.compile in 2.13
    exported_program: Any,
    inputs: Sequence[Sequence[Any]] | None = None,
    *,
    arg_inputs: Sequence[Sequence[Any]] | None = None,
    kwarg_inputs: dict[Any, Any] | None = None,
    device: Any = None,
    disable_tf32: bool = False,
    assume_dynamic_shape_support: bool = False,
    sparse_weights: bool = False,
    engine_capability: Any = None,
    num_avg_timing_iters: int = 1,
    workspace_size: int = 0,
    truncate_double: bool = False,
    require_full_compilation: bool = False,
    min_block_size: int = 5,
    torch_executed_ops: Collection[Any] | None = None,
    version_compatible: bool = False,
    optimization_level: int | None = None,
    hardware_compatible: bool = False,
    timing_cache_path: str = "",
    immutable_weights: bool = True,
    enable_weight_streaming: bool = False,
    offload_module_to_cpu: bool = False,
) -> Any:
    return SimpleNamespace(**locals())


def save_213(  # torch_tensorrt.save of 2.13
    module: Any,
    file_path: str = "",
    *,
    extra_files: dict[str, str] | None = None,
    output_format: str = "exported_program",
    inputs: Sequence[Any] | None = None,
    arg_inputs: Sequence[Any] | None = None,
    kwarg_inputs: dict[str, Any] | None = None,
    retrace: bool = True,
    use_legacy_exporter: bool | None = None,
    pickle_protocol: int = 2,
    dynamic_shapes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    assert not kwargs
    assert (output_format, retrace) == ("exported_program", False)
    Path(file_path).write_text("an engine")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library with the real one's signatures, on a GPU of compute capability 9.0."""
    fake, tensorrt = ModuleType("torch_tensorrt"), ModuleType("tensorrt")
    fake.Input, fake.save, fake.dynamo = FakeInput, save_213, SimpleNamespace(compile=compile_213)  # type: ignore[attr-defined]
    tensorrt.__version__ = "11.0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    real = metadata.version
    monkeypatch.setattr(torch_tensorrt, "version", lambda name: "2.13.0" if name == "torch_tensorrt" else real(name))
    monkeypatch.setattr(torch_tensorrt, "gpu_sm", lambda device: "90" if device.startswith("cuda") else "")
    return fake


@pytest.fixture
def manifest(graphless: Path) -> Manifest:
    return open_bundle(graphless)


@pytest.mark.usefixtures("library")
def test_the_key_holds_what_the_engine_hangs_on(manifest: Manifest) -> None:
    key = torch_tensorrt.make_key(manifest, EngineOptions(), "cuda")
    assert key.target == "sm_90"
    assert key.version == f"torch-tensorrt 2.13.0, tensorrt 11.0.0, torch {torch.__version__}"
    other = {**manifest.files, WEIGHTS: manifest.files[WEIGHTS].model_copy(update={"sha256": "0" * 64})}
    changed = torch_tensorrt.make_key(manifest.model_copy(update={"files": other}), EngineOptions(), "cuda")
    assert changed.source != key.source  # TensorRT's engines hold their weights
    assert torch_tensorrt.make_key(manifest, EngineOptions(sparse=False), "cuda").file != key.file


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", "it needs a CUDA GPU, and the device is cpu"),
        ({"target": "sm_89"}, "cuda", "it was built for sm_89, and cuda is sm_90"),
        ({"version": "torch-tensorrt 2.12.0"}, "cuda", "it was built with torch-tensorrt 2.12.0, and here is"),
        ({"cuda": "12.8"}, "cuda", "it was built with CUDA 12.8, and this torch has"),
    ],
)
def test_an_engine_for_another_machine_says_why_not(
    manifest: Manifest, changes: dict[str, str], device: str, reason: str
) -> None:
    key = torch_tensorrt.make_key(manifest, EngineOptions(), "cuda")
    assert torch_tensorrt.misfit(key.model_copy(update=changes), device).startswith(reason)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_library_is_asked_for_what_it_knows(
    graphless: Path,
    manifest: Manifest,
    library: Any,
    sparse: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def compile_program(*args: Any, **kwargs: Any) -> Any:
        asked.append(inspect.signature(compile_213).bind(*args, **kwargs).arguments)
        return compile_213(*args, **kwargs)

    library.dynamo.compile = compile_program
    monkeypatch.setattr(torch_tensorrt, "load_module", lambda *_: "module")
    monkeypatch.setattr(torch_tensorrt, "trace", lambda *_: "program")
    key: EngineKey = torch_tensorrt.make_key(manifest, EngineOptions(sparse=sparse), "cuda")
    torch_tensorrt.build(graphless, manifest, key, tmp_path / "out", Progress())
    assert (tmp_path / "out").read_text() == "an engine"
    (call,) = asked
    assert (call["exported_program"], call["sparse_weights"]) == ("program", sparse)
    inputs = {entry.name: entry for entry in call["arg_inputs"]}
    axes = manifest.axes
    assert list(inputs) == [entry.name for entry in manifest.inputs]
    image, time = inputs["hidden_states"], inputs["timestep"]
    channels = image.opt_shape[1]
    for which in ("min", "opt", "max"):
        sides = [getattr(axes[name], which) for name in ("batch", "height", "width")]
        assert getattr(image, f"{which}_shape") == (sides[0], channels, *sides[1:])
        assert getattr(time, f"{which}_shape") == (sides[0],)
    assert image.dtype == torch.float32


def test_what_the_library_raises_is_one_sentence(
    graphless: Path, manifest: Manifest, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no converter for aten.fold\nand pages")

    library.dynamo.compile = library.load = fail
    monkeypatch.setattr(torch_tensorrt, "load_module", lambda *_: "module")
    monkeypatch.setattr(torch_tensorrt, "trace", lambda *_: "program")
    key = torch_tensorrt.make_key(manifest, EngineOptions(), "cuda")
    with pytest.raises(ObsdiffError, match=r"Torch-TensorRT could not compile the denoiser: no converter for \S+$"):
        torch_tensorrt.build(graphless, manifest, key, tmp_path / "out", Progress())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    with pytest.raises(ObsdiffError, match=r"engine\.pt2 is not an engine that Torch-TensorRT built: no converter"):
        torch_tensorrt.open_engine(tmp_path / "engine.pt2", manifest, key, "cuda")


def test_a_machine_without_a_gpu_is_refused_first(one_block_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="builds on the GPU that it is for, and the device is cpu"):
        export(one_block_sd3, tmp_path / "bundle", formats=("torch-tensorrt",), device="cpu")
    assert not list(tmp_path.iterdir())


def test_its_absence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(InputError, match=r"pip install 'obsdiff\[torch-tensorrt\]'"):
        torch_tensorrt.load_library()


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_on_a_gpu_it_computes_what_the_module_does(one_block_sd3: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    manifest = export(one_block_sd3, path, formats=("torch-tensorrt",), precision="fp16", device="cuda")
    assert manifest.engines[0].check is not None  # the export compares it at two shapes
    denoise, reference = (load_backend(name, path, manifest, "cuda") for name in ("torch-tensorrt", "torch"))
    config, usual = bundle_source(path, manifest).config, {name: axis.opt for name, axis in manifest.axes.items()}
    for seed in range(3):  # called, recorded, replayed
        inputs = random_inputs(manifest.spec, config, usual, torch.float16, "cuda", seed)
        got, wanted = denoise(**inputs).float(), reference(**inputs).float()
        assert (got - wanted).norm() < 2e-2 * wanted.norm()
