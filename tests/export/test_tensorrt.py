"""TensorRT and TensorRT-RTX: what is built for whom, what runs where, and what is refused before anything is built."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from obsdiff.errors import InputError
from obsdiff.export import engines, tensorrt, tensorrt_rtx
from obsdiff.export.bundle import GRAPH, Manifest, read_manifest
from obsdiff.export.schema import Axis, EngineKey, EngineOptions, File

trt = pytest.importorskip("tensorrt_rtx")
SM86 = EngineOptions(sm=("86",))


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return read_manifest(one_block_bundle)


@pytest.fixture(scope="module")
def key(manifest: Manifest) -> EngineKey:
    """Of an engine for the SM86."""
    return tensorrt_rtx.make_key(manifest, SM86, "cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch say that there is a GPU of some compute capability."""

    def make(sm: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (int(sm[:-1]), int(sm[-1])))

    return make


@pytest.fixture
def with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT 11.4, of which only the version is there."""
    load = tensorrt.load_library
    fake = SimpleNamespace(__version__="11.4.0.106")
    monkeypatch.setattr(tensorrt, "load_library", lambda name: fake if name == "tensorrt" else load(name))


def test_the_key_says_what_the_engine_hangs_on(manifest: Manifest, key: EngineKey) -> None:
    assert (key.format, key.target, key.version, key.cuda) == ("tensorrt-rtx", "sm_86", trt.__version__, "13")
    assert (key.precision, key.profile, key.options) == ("fp32", manifest.axes, EngineOptions())
    assert len({key.file for key in other_keys(manifest)} | {key.file}) == 1 + len(other_keys(manifest))


def other_keys(manifest: Manifest) -> list[EngineKey]:
    """Keys that differ from SM86's in one thing each; the last in the weights beside a graph past 2 GB."""
    weights = File(bytes=1, sha256="0" * 64)
    return [
        tensorrt_rtx.make_key(manifest, EngineOptions(sm=("89",)), "cpu"),
        tensorrt_rtx.make_key(manifest, EngineOptions(sm=("86",), weight_streaming=True), "cpu"),
        tensorrt_rtx.make_key(manifest.model_copy(update={"precision": "fp16"}), SM86, "cpu"),
        tensorrt_rtx.make_key(manifest.model_copy(update={"axes": {"batch": Axis(min=1, opt=1, max=1)}}), SM86, "cpu"),
        tensorrt_rtx.make_key(
            manifest.model_copy(update={"files": manifest.files | {f"{GRAPH}.data": weights}}), SM86, "cpu"
        ),
    ]


def test_the_order_of_gpus_is_no_difference(manifest: Manifest) -> None:
    one, two = (tensorrt_rtx.make_key(manifest, EngineOptions(sm=sm), "cpu") for sm in (("89", "86"), ("86", "89")))
    assert one == two
    assert one.target == "sm_86+sm_89"


def test_without_a_gpu_tensorrt_rtx_builds_for_all_from_ampere_on(manifest: Manifest) -> None:
    assert tensorrt_rtx.make_key(manifest, EngineOptions(), "cpu").target == "sm_80+sm_86+sm_89+sm_120+sm_121"


def test_with_a_gpu_it_builds_for_that(manifest: Manifest, gpu: Any, with_tensorrt: None) -> None:
    gpu("89")
    assert tensorrt_rtx.make_key(manifest, EngineOptions(), "cuda").target == "sm_89"
    assert tensorrt.make_key(manifest, EngineOptions(sm=("89",)), "cuda:0").target == "sm_89"
    assert tensorrt_rtx.check(EngineOptions(refit=True), "cuda", "fp32") == ["89"]


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        (EngineOptions(sm=("90",)), "fp16", "--sm 90: TensorRT-RTX .* knows the SMs 75, 80, .* use --format tensorrt$"),
        (EngineOptions(sm=("75", "86")), "bf16", "--sm 75: TensorRT-RTX .* no bf16 .* fp16 only"),
        (EngineOptions(sm=("75",)), "fp32", "--sm 75: .* fp16 only"),
        (EngineOptions(sm=("86",), refit=True), "fp16", "--refit: .* only where there is a CUDA GPU"),
    ],
    ids=str,
)
def test_what_tensorrt_rtx_cannot_build_is_refused_at_once(
    options: EngineOptions, precision: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tensorrt_rtx.check(options, "cpu", precision)


def test_turing_takes_fp16(manifest: Manifest) -> None:
    assert tensorrt_rtx.check(EngineOptions(sm=("75",)), "cpu", "fp16") == ["75"]


def test_tensorrt_builds_only_where_it_runs(manifest: Manifest, gpu: Any, with_tensorrt: None) -> None:
    with pytest.raises(InputError, match="on the CUDA GPU that the engine is for, and there is none here"):
        tensorrt.check(EngineOptions(), "cpu", "fp16")
    gpu("90")
    with pytest.raises(InputError, match="--sm 89: TensorRT builds for the GPU at hand, an sm_90"):
        tensorrt.check(EngineOptions(sm=("90", "89")), "cuda", "fp16")


def test_a_library_that_is_not_there_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "__path__", [], raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(InputError, match=r"TensorRT does not load: libnvinfer\.so\.11"):
        tensorrt.load_library("tensorrt")
    (tmp_path / "tensorrt.py").write_text("import nothing_of_that_name")
    with pytest.raises(InputError, match="TensorRT does not load: No module named 'nothing_of_that_name'"):
        tensorrt.load_library("tensorrt")
    (tmp_path / "tensorrt.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"TensorRT is not installed: pip install 'obsdiff\[tensorrt\]'"):
        tensorrt.load_library("tensorrt")


def test_a_bundle_without_a_graph_says_how_to_get_one(graphless: Path) -> None:
    with pytest.raises(InputError, match=r"no ONNX graph .* --format onnx"):
        tensorrt_rtx.make_key(read_manifest(graphless), SM86, "cpu")


@pytest.mark.parametrize(
    ("sm", "changes", "reason"),
    [
        ("86", {}, ""),
        ("89", {"target": "sm_86+sm_89"}, ""),
        ("90", {}, "it is for sm_86, and cuda is an sm_90"),
        ("120", {"target": "sm_80+sm_86"}, "it is for sm_80 or sm_86, and cuda is an sm_120"),
        ("90", {"options": EngineOptions(hardware_compatible=True)}, ""),
        ("75", {"options": EngineOptions(hardware_compatible=True)}, "it is for sm_86, and cuda is an sm_75"),
        ("86", {"version": "11.0.0"}, "it was built by TensorRT 11.0.0, and 11.4.0.106 is installed"),
        ("86", {"version": "11.0.0", "options": EngineOptions(version_compatible=True)}, ""),
        (
            "86",
            {"version": "11.9.0", "options": EngineOptions(version_compatible=True)},
            "it was built by TensorRT 11.9",
        ),
        (
            "86",
            {"version": "10.9.0", "options": EngineOptions(version_compatible=True)},
            "it was built by TensorRT 10.9",
        ),
    ],
    ids=str,
)
def test_an_engine_that_does_not_fit_says_why(
    key: EngineKey, gpu: Any, with_tensorrt: None, sm: str, changes: dict[str, Any], reason: str
) -> None:
    changed = key.model_copy(update={"format": "tensorrt", "version": "11.4.0.106", **changes})
    assert tensorrt.misfit(changed, "cpu").startswith("it runs on a CUDA GPU, sm_")
    gpu(sm)
    said = tensorrt.misfit(changed, "cuda")
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


def test_an_engine_that_runs_nowhere_here_is_neither_built_nor_taken(
    one_block_bundle: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="--backend tensorrt-rtx does not run on cpu: it runs on a CUDA GPU"):
        engines.open_engine("tensorrt-rtx", one_block_bundle, manifest, "cpu")
    assert not list(tmp_path.iterdir())


def test_options_that_no_format_heeds_are_refused() -> None:
    with pytest.raises(InputError, match="--sm is for --format tensorrt or tensorrt-rtx"):
        engines.check_options(["aoti"], SM86, "cpu", "fp32")
    with pytest.raises(InputError, match=r"--version-compatible is for --format tensorrt$"):
        engines.check_options(["tensorrt-rtx"], EngineOptions(version_compatible=True), "cpu", "fp32")
    engines.check_options(["tensorrt-rtx"], EngineOptions(sm=("86",), weight_streaming=True), "cpu", "fp32")
    kept = engines.heeded("tensorrt-rtx", EngineOptions(sm=("86",), version_compatible=True, sparse=False))
    assert kept == EngineOptions(sm=("86",), sparse=False)


@pytest.mark.parametrize(
    ("sm", "wanted"), [("86", ("86",)), ("8.6, sm_120,86", ("86", "120")), (None, ()), ("", ())], ids=str
)
def test_sms_are_written_as_one_likes(sm: str | None, wanted: tuple[str, ...]) -> None:
    assert engines.parse_options(sm).sm == wanted


@pytest.mark.parametrize("sm", ["ada", "86;89", "8", "86,"])
def test_what_is_no_sm_is_refused(sm: str) -> None:
    with pytest.raises(InputError, match="is no compute capability, such as 86 or 86,89"):
        engines.parse_options(sm)


def test_an_engine_that_carries_code_is_known_as_such(key: EngineKey) -> None:
    assert not engines.runs_code(key)
    assert engines.runs_code(key.model_copy(update={"options": EngineOptions(version_compatible=True)}))
