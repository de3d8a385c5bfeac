"""TensorRT's engines on a GPU: right in every precision, on several streams, replayed from CUDA graphs, rebuilt."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from obsdiff.errors import ObsdiffError
from obsdiff.export import engines, parity
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.export.schema import EngineOptions, Precision
from obsdiff.export.stage import export
from obsdiff.files import read_json
from obsdiff.models import graph
from obsdiff.runtime.backends import load_backend

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]
FORMATS = ("tensorrt", "tensorrt-rtx")


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 bundle with an engine for this GPU."""
    pytest.importorskip(request.param.replace("-", "_"))
    out = tmp_path_factory.mktemp("trt") / "bundle"
    export(one_block_sd3, out, formats=("onnx", request.param), precision="fp16", device="cuda")
    return out


def inputs_of(bundle: Path, manifest: Manifest, seed: int, batch: int = 2) -> dict[str, Tensor]:
    config = read_json(bundle / "denoiser" / "config.json")
    axes = {name: axis.opt for name, axis in manifest.axes.items()} | {"batch": batch}
    return graph.random_inputs(manifest.spec, config, axes, torch.float16, "cuda", seed)


def agrees(bundle: Path, manifest: Manifest, denoise: Callable[..., Tensor], seed: int, batch: int = 2) -> None:
    inputs = inputs_of(bundle, manifest, seed, batch)
    wanted = load_backend("torch", bundle, manifest, "cuda")(**inputs).float()
    assert (denoise(**inputs).float() - wanted).norm() < parity.TOLERANCE["fp16"] * wanted.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_engine_agrees_with_pytorch(name: str, precision: Precision, one_block_sd3: Path, tmp_path: Path) -> None:
    pytest.importorskip(name.replace("-", "_"))
    manifest = export(one_block_sd3, tmp_path / "b", formats=(name,), precision=precision, device="cuda")
    check = manifest.engines[0].check
    assert check is not None
    assert check.relative_error < check.tolerance


def test_shapes_that_come_again_are_replayed(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    denoise = load_backend(manifest.engines[0].key.format, bundle, manifest, "cuda", build=False)
    for seed in range(6):
        for batch in (1, 2, 4):
            agrees(bundle, manifest, denoise, seed, batch)


def test_streams_do_not_disturb_each_other(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    denoise = load_backend(manifest.engines[0].key.format, bundle, manifest, "cuda", build=False)
    inputs = [inputs_of(bundle, manifest, seed) for seed in range(4)]
    alone = [denoise(**values) for values in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        together = []
        for i, values in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                together.append(denoise(**values))
        torch.cuda.synchronize()
        assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(alone, together, strict=True))


def test_a_damaged_engine_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(bundle)
    key = manifest.engines[0].key
    content = (bundle / manifest.engines[0].path).read_bytes()
    for damaged in (content[: len(content) // 2], os.urandom(len(content)), b""):
        path = tmp_path / key.file
        path.write_bytes(damaged)
        with pytest.raises(ObsdiffError, match=r"no engine that|does not run here|is empty"):
            engines.load_format(key.format).open_engine(path, manifest, key, "cuda", bundle)


def test_tensorrt_tells_of_its_layers_and_keeps_its_timings(one_block_sd3: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    out, timings = tmp_path / "b", tmp_path / "timings"
    options = EngineOptions(refit=True)
    manifest = export(
        one_block_sd3, out, formats=("tensorrt",), precision="fp16", options=options, timing_cache=timings
    )
    assert timings.stat().st_size > 100
    told = json.loads((out / f"{manifest.engines[0].path}.layers.json").read_text())
    assert told["layers"]
    assert all("Name" in layer for layer in told["layers"])


@pytest.mark.parametrize(
    "options", [{"weight_streaming": True}, {"version_compatible": True}, {"hardware_compatible": True}]
)
def test_options_of_tensorrt_build_and_run(options: dict[str, bool], one_block_sd3: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    wanted = EngineOptions(**options)
    manifest = export(one_block_sd3, tmp_path / "b", formats=("tensorrt",), precision="fp16", options=wanted)
    assert manifest.engines[0].check is not None
