"""AOTInductor's engines: what PyTorch computes, with the bundle's own weights, on machines that they fit."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import aoti, engines
from obsdiff.export.bundle import WEIGHTS, Manifest, open_bundle
from obsdiff.export.parity import DTYPES, TOLERANCE
from obsdiff.export.program import load_module
from obsdiff.export.schema import EngineKey, EngineOptions, Precision, Tuned
from obsdiff.export.stage import export
from obsdiff.models.graph import random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.progress import Progress
from obsdiff.runtime.backends import FOREIGN, choose_backend, load_backend, unready
from obsdiff.runtime.pipeline import bundle_source

SHAPES = [
    {"batch": 1, "height": 8, "width": 8, "tokens": 12},
    {"batch": 7, "height": 4, "width": 10, "tokens": 1},
    {"batch": 2, "height": 12, "width": 6, "tokens": 333},
]

pytestmark = pytest.mark.timeout(900)  # the compiler's half minute is many on a busy machine


@pytest.fixture(scope="module")
def bundle(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one engine that these tests compile."""
    path = tmp_path_factory.mktemp("aoti") / "bundle"
    export(one_block_sd3, path, formats=("aoti",), device="cpu")
    return path


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle)


@pytest.fixture
def key(manifest: Manifest) -> EngineKey:
    return manifest.engines[0].key


def inputs_at(bundle: Path, manifest: Manifest, shape: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    return random_inputs(SD3, bundle_source(bundle, manifest).config, shape, seed=seed)


def test_it_computes_what_the_module_does(bundle: Path, manifest: Manifest) -> None:
    denoise, reference = (load_backend(name, bundle, manifest, "cpu") for name in ("aoti", "torch"))
    for seed, shape in enumerate(SHAPES):
        inputs = inputs_at(bundle, manifest, shape, seed)
        kept = {name: value.clone() for name, value in inputs.items()}
        got, wanted = denoise(**inputs), reference(**inputs)
        assert (got - wanted).norm() < 1e-5 * wanted.norm()
        assert all(torch.equal(kept[name], value) for name, value in inputs.items())
        copy = got.clone()
        denoise(**inputs_at(bundle, manifest, shape, seed + 9))
        assert torch.equal(got, copy)
        inputs["hidden_states"] = inputs["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(denoise(**inputs), copy)


def test_the_export_checked_it_and_says_what_it_is_for(bundle: Path, manifest: Manifest, key: EngineKey) -> None:
    (engine,) = manifest.engines
    assert engine.check is not None
    assert engine.check.relative_error < 1e-5
    assert re.fullmatch(r"cpu-\w+-\w+-[0-9a-f]{8}", key.target)
    assert key == aoti.make_key(manifest, EngineOptions(), "cpu")
    assert aoti.misfit(key, "cpu") == ""


def test_the_weights_are_the_bundles(bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    names = ZipFile(bundle / manifest.engines[0].path).namelist()
    assert not [name for name in names if "weight" in name or name.endswith(".bin")]
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    weights = load_file(other / WEIGHTS)
    save_file({name: value * 0.5 for name, value in weights.items()}, other / WEIGHTS)
    inputs = inputs_at(bundle, manifest, SHAPES[0])
    outputs = [load_backend("aoti", path, manifest, "cpu")(**inputs) for path in (bundle, other)]
    wanted = load_backend("torch", other, manifest, "cpu")(**inputs)
    assert (outputs[1] - wanted).norm() < 1e-5 * wanted.norm()
    assert (outputs[0] - wanted).norm() > 1e-2 * wanted.norm()


def test_it_takes_as_many_threads_as_torch_has_when_it_runs(bundle: Path, manifest: Manifest) -> None:
    package = ZipFile(bundle / manifest.engines[0].path)
    code = "".join(package.read(name).decode() for name in package.namelist() if name.endswith(".cpp"))
    assert "#pragma omp" in code
    assert "num_threads(" not in code


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.11.0+cu130"}, r"compiled with torch 2\.11\.0\+cu130, and this is torch "),
        ({"cuda": "12.8"}, r"compiled with CUDA 12\.8, and this torch has "),
        ({"target": "sm_90-x86_64-avx512-00000000"}, "compiled for sm_90, and cpu is cpu"),
        ({"target": "cpu-x86_64-avx9-00000000"}, "a processor with other features"),
    ],
)
def test_an_engine_for_another_machine_says_why_not(key: EngineKey, changes: dict[str, str], reason: str) -> None:
    assert re.search(reason, aoti.misfit(key.model_copy(update=changes), "cpu"))


def test_the_key_hangs_on_the_program_and_not_on_the_weights(manifest: Manifest, key: EngineKey) -> None:
    def made(**changes: Any) -> EngineKey:
        return aoti.make_key(manifest.model_copy(update=changes), EngineOptions(), "cpu")

    def file(name: str) -> dict[str, Any]:
        return {**manifest.files, name: manifest.files[name].model_copy(update={"sha256": "0" * 64})}

    assert made(files=file(WEIGHTS)) == key
    others = [
        made(files=file("denoiser/config.json")),
        made(precision="bf16"),
        made(axes={**manifest.axes, "batch": manifest.axes["batch"].model_copy(update={"max": 99})}),
        made(inputs=manifest.inputs[::-1]),
    ]
    assert len({other.file for other in others} | {key.file}) == 5
    with pytest.raises(InputError, match="AOTInductor compiles for cpu and cuda here, not for meta"):
        aoti.make_key(manifest, EngineOptions(), "meta")


def test_the_processor_is_known_by_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(flags: str) -> str:
        monkeypatch.setattr(aoti, "_processor", lambda: flags)
        return aoti._target("cpu")

    assert target("flags : fpu sse4_2 avx2 fma") == target("flags : fma avx2 sse4_2 hypervisor ibpb")
    assert target("flags : sse4_2 avx2 fma") != target("flags : sse4_2 avx2 fma avx512f")


@pytest.fixture
def _no_compiler() -> Iterator[None]:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch("cpp.cxx", ("no-such-compiler",)):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_a_missing_compiler_is_said_before_anything_starts(one_block_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is none: install g\+\+ \(apt install g\+\+\), or name one .* CXX"):
        export(one_block_sd3, tmp_path / "bundle", formats=("aoti",), device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_compiler")
def test_an_engine_runs_where_there_is_no_compiler(bundle: Path, manifest: Manifest) -> None:
    assert load_backend("aoti", bundle, manifest, "cpu")(**inputs_at(bundle, manifest, SHAPES[0])).isfinite().all()


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nand pages more"), KeyboardInterrupt()])
def test_what_stops_the_compiler_leaves_nothing(
    graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def compile_some(_program: Any, package_path: str, **_options: Any) -> None:
        Path(package_path).write_text("half of it")
        raise error

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_some)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(aoti, "trace", lambda *_: SimpleNamespace(constants={}))
    manifest = open_bundle(graphless)
    with pytest.raises((ObsdiffError, KeyboardInterrupt)) as caught:
        aoti.build(graphless, manifest, aoti.make_key(manifest, EngineOptions(), "cpu"), tmp_path / "out", Progress())
    assert not list(tmp_path.iterdir())
    if isinstance(error, RuntimeError):
        assert str(caught.value) == "AOTInductor could not compile the denoiser: no kernel"


def test_tensors_that_no_weight_is_are_refused(
    graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aoti, "trace", lambda *_: SimpleNamespace(constants={"lifted_tensor_0": torch.ones(2)}))
    manifest = open_bundle(graphless)
    with pytest.raises(ObsdiffError, match=r"makes tensors of its own in a call \(lifted_tensor_0\)"):
        aoti.build(graphless, manifest, aoti.make_key(manifest, EngineOptions(), "cpu"), tmp_path / "out", Progress())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _other_zip(path: Path) -> None:
    with ZipFile(path, "w") as file:
        file.writestr("archive/data/aotinductor/model/readme.txt", "nothing")


def _broken_code(path: Path) -> None:
    package = ZipFile(path)
    held = {name: package.read(name) for name in package.namelist()}
    with ZipFile(path, "w") as file:
        for name, data in held.items():
            file.writestr(name, b"\x7fELF of no use" if name.endswith(".so") else data)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _other_zip, _broken_code, lambda path: path.write_bytes(b""), lambda path: path.write_text("pt2")],
)
def test_a_damaged_engine_is_named(
    bundle: Path, manifest: Manifest, key: EngineKey, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    path = Path(shutil.copy(bundle / manifest.engines[0].path, tmp_path / "engine.pt2"))
    damage(path)
    with pytest.raises(ObsdiffError, match=r"engine\.pt2 is not an engine that AOTInductor compiled: ") as caught:
        aoti.open_engine(path, manifest, key, "cpu", bundle)
    assert len(str(caught.value).splitlines()) == 1


def test_the_engine_of_another_denoiser_is_refused(
    bundle: Path, manifest: Manifest, key: EngineKey, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    export(tiny_model("dit"), other, formats=())
    with pytest.raises(ObsdiffError, match=r"compiled for another denoiser: .*other has no denoiser\."):
        aoti.open_engine(bundle / manifest.engines[0].path, open_bundle(other), key, "cpu", other)


def test_an_engine_is_built_into_the_cache_once_for_all_weights(
    bundle: Path, manifest: Manifest, graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    built = []

    def build(_bundle: Path, _manifest: Manifest, key: EngineKey, out: Path, _progress: Progress) -> None:
        built.append(key)
        shutil.copy(bundle / manifest.engines[0].path, out)

    monkeypatch.setattr(aoti, "build", build)
    plain = open_bundle(graphless)
    with pytest.raises(InputError, match="--no-build"):
        load_backend("aoti", graphless, plain, "cpu", build=False)
    inputs = inputs_at(bundle, manifest, SHAPES[0])
    first, second = (load_backend("aoti", graphless, plain, "cpu")(**inputs) for _ in range(2))
    assert torch.equal(first, second)
    assert len(built) == 1


def test_auto_leaves_an_engine_alone_that_this_user_did_not_build(
    bundle: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsdiff.device import describe

    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path))
    assert unready("aoti", bundle, manifest, "cpu") == FOREIGN
    loaded: list[Any] = []
    monkeypatch.setattr(aoti, "open_engine", lambda *args: loaded.append(args))
    record = {name: getattr(describe("cpu"), name) for name in ("kind", "name", "target")}
    fields = {name for name in Tuned.model_fields if name not in record}
    tuned = Tuned.model_construct(**record, **dict.fromkeys(fields, None) | {"backend": "aoti"})
    manifest = manifest.model_copy(update={"tuned": [tuned]})
    assert choose_backend(bundle, manifest, "cpu") == "torch"
    engines.mark_built(bundle / manifest.engines[0].path)
    assert choose_backend(bundle, manifest, "cpu") == "aoti"
    assert not loaded


def test_the_module_is_where_names_of_weights_come_from(bundle: Path, manifest: Manifest) -> None:
    weights = aoti._weights(load_module(bundle, manifest, "cpu"))
    assert {f"denoiser.{name}" for name in load_file(bundle / WEIGHTS)} <= set(weights)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu_it_computes_what_the_module_does(one_block_sd3: Path, tmp_path: Path, precision: Precision) -> None:
    path = tmp_path / "bundle"
    manifest = export(one_block_sd3, path, formats=("aoti",), precision=precision, device="cuda")
    assert manifest.engines[0].key.target.startswith("sm_")
    denoise, reference = (load_backend(name, path, manifest, "cuda") for name in ("aoti", "torch"))
    kept = []
    for seed, shape in enumerate([SHAPES[0], SHAPES[0], SHAPES[1], SHAPES[0], SHAPES[1]]):  # called, recorded, replayed
        drawn = random_inputs(SD3, bundle_source(path, manifest).config, shape, DTYPES[precision], "cuda", seed)
        kept.append((denoise(**drawn).float(), reference(**drawn).float()))
    for got, wanted in kept:
        assert (got - wanted).norm() < TOLERANCE[precision] * wanted.norm()
