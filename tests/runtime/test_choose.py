"""`auto`: the tuned record of this device, else the stated order, and never a stranger's code."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from obsdiff.cli.options import Backend
from obsdiff.device import describe
from obsdiff.errors import InputError
from obsdiff.export import engines
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.export.schema import Engine, EngineFormat, EngineKey, EngineOptions, Tuned
from obsdiff.files import sha256, write_json
from obsdiff.progress import Progress
from obsdiff.runtime import backends
from obsdiff.runtime.backends import BACKENDS, ORDER, choose_backend, load_backend
from obsdiff.runtime.pipeline import load


class Heard(Progress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def tuned_to(backend: str, **changes: Any) -> Tuned:
    """A record of this processor."""
    record = {"threads": 1, "shapes": [], "milliseconds": {}, "versions": {}, "backend": backend}
    return Tuned(**{**describe("cpu")._asdict(), **record, **changes})


def key_of(manifest: Manifest, name: EngineFormat, version: str = "1") -> EngineKey:
    return EngineKey(
        format=name,
        source="0" * 64,
        target="cpu-test",
        version=version,
        cuda="",
        precision=manifest.precision,
        profile=manifest.axes,
        options=EngineOptions(),
    )


@pytest.fixture
def fake_aoti(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A format in the place of aoti, whose engines answer with zeros; `opened` counts what was loaded."""
    module: Any = ModuleType("fake_aoti")
    module.opened = []

    def build(bundle: Path, manifest: Manifest, key: EngineKey, out: Path, progress: Progress) -> None:
        out.write_text("an engine")

    def open_engine(path: Path, manifest: Manifest, key: EngineKey, device: str, *_: Any) -> engines.Denoise:
        module.opened.append(path)

        def zeros(**inputs: Tensor) -> Tensor:
            return torch.zeros_like(inputs["hidden_states"])

        return zeros

    module.make_key = lambda manifest, options, device: key_of(manifest, "aoti")
    module.misfit = lambda key, device: "" if key.version == "1" else "it is of another version"
    module.build, module.open_engine = build, open_engine
    monkeypatch.setitem(sys.modules, "fake_aoti", module)
    monkeypatch.setitem(engines.FORMATS, "aoti", "fake_aoti")
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path / "cache"))
    return module


def with_engine(bundle: Path, folder: Path, *, record: bool, version: str = "1") -> Path:
    """A copy of the bundle as a stranger gave it: with an aoti engine and, if asked, a record that says to take it."""
    copy = Path(shutil.copytree(bundle, folder / "stranger"))
    manifest = open_bundle(copy)
    engine = Engine(key=key_of(manifest, "aoti", version), seconds=1, check=None)
    (copy / "engines").mkdir()
    (copy / engine.path).write_text("a stranger's engine")
    value = json.loads((copy / "manifest.json").read_text())
    value["engines"] = [engine.model_dump(mode="json")]
    value["files"][engine.path] = {
        "bytes": (copy / engine.path).stat().st_size,
        "sha256": sha256(copy / engine.path),
    }
    value["tuned"] = [tuned_to("aoti").model_dump(mode="json")] if record else []
    write_json(copy / "manifest.json", value)
    return copy


@pytest.fixture(scope="module")
def manifest(one_block_bundle: Path) -> Manifest:
    return open_bundle(one_block_bundle)


@given(ready=st.sets(st.sampled_from(BACKENDS)), device=st.sampled_from(["cpu", "cuda", "cuda:1"]))
def test_without_a_record_the_first_of_the_order_that_is_ready_is_taken(
    one_block_bundle: Path, manifest: Manifest, ready: set[str], device: str
) -> None:
    with mock.patch.object(backends, "unready", lambda name, *_: "" if name in ready else "no"):
        taken = choose_backend(one_block_bundle, manifest, device)
    order = ORDER[device.partition(":")[0]]
    assert taken == next((name for name in order if name in ready), "torch")


def test_on_a_processor_the_graph_decides(one_block_bundle: Path, manifest: Manifest) -> None:
    heard = Heard()
    assert choose_backend(one_block_bundle, manifest, "cpu", heard) == "onnxruntime"
    assert heard.messages == ["backend: onnxruntime, the first that is ready (obsdiff tune finds the fastest)"]
    assert choose_backend(one_block_bundle, manifest.model_copy(update={"formats": {}}), "cpu") == "torch"


def test_choosing_imports_no_runtime(
    one_block_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert choose_backend(one_block_bundle, manifest, "cpu") == "onnxruntime"


def test_what_is_not_installed_is_passed_over(
    one_block_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose_backend(one_block_bundle, manifest, "cpu") == "torch"


def test_a_gpu_without_cudas_provider_runs_torch(one_block_bundle: Path, manifest: Manifest) -> None:
    assert choose_backend(one_block_bundle, manifest, "cuda") == "torch"
    assert "CUDAExecutionProvider" in backends.obstacle("onnxruntime", manifest, "cuda")


def test_the_record_of_this_device_is_followed_and_said(one_block_bundle: Path, manifest: Manifest) -> None:
    other = tuned_to("torch", name="another processor")
    heard = Heard()
    tuned = manifest.model_copy(update={"tuned": [other, tuned_to("torch")]})
    assert choose_backend(one_block_bundle, tuned, "cpu", heard) == "torch"
    assert heard.messages == ["backend: torch, the fastest when this device was tuned"]
    for changes in ({"name": "another processor"}, {"target": "none"}, {"kind": "cuda"}):
        strange = manifest.model_copy(update={"tuned": [tuned_to("torch", **changes)]})
        assert choose_backend(one_block_bundle, strange, "cpu") == "onnxruntime"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("abacus", "this obsdiff has no such backend"),
        ("torch-sparse", "it needs a CUDA GPU"),
        ("aoti", "no engine fits: the bundle has none"),
    ],
)
def test_a_record_that_cannot_be_used_is_said_and_passed_over(
    one_block_bundle: Path, manifest: Manifest, fake_aoti: Any, backend: str, reason: str
) -> None:
    heard = Heard()
    tuned = manifest.model_copy(update={"tuned": [tuned_to(backend)]})
    assert choose_backend(one_block_bundle, tuned, "cpu", heard) == "onnxruntime"
    assert heard.messages == [
        f"this device was tuned to {backend}, which cannot be used: {reason}",
        "backend: onnxruntime, the first that is ready",
    ]


@pytest.mark.parametrize("record", [False, True], ids=["no record", "its record"])
@pytest.mark.parametrize("order", [False, True], ids=["", "first in order"])
def test_a_strangers_engine_is_not_loaded_unless_it_is_named(
    one_block_bundle: Path, fake_aoti: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: bool, order: bool
) -> None:
    stranger = with_engine(one_block_bundle, tmp_path, record=record)
    if order:
        monkeypatch.setitem(ORDER, "cpu", ("aoti", "onnxruntime", "torch"))
    assert load(stranger, device="cpu").obsdiff_backend == "onnxruntime"
    assert fake_aoti.opened == []
    load_backend("aoti", stranger, open_bundle(stranger), "cpu")
    (path,) = fake_aoti.opened
    engines.mark_built(path)
    assert load(stranger, device="cpu").obsdiff_backend == ("aoti" if record or order else "onnxruntime")


def test_an_engine_that_does_not_fit_is_not_built_by_auto(
    one_block_bundle: Path, fake_aoti: Any, tmp_path: Path
) -> None:
    stranger = with_engine(one_block_bundle, tmp_path, record=True, version="2")
    manifest, heard = open_bundle(stranger), Heard()
    assert choose_backend(stranger, manifest, "cpu", heard) == "onnxruntime"
    assert "no engine fits: it is of another version" in heard.messages[0]
    with pytest.raises(InputError, match="--no-build forbids"):
        load_backend("aoti", stranger, manifest, "cpu", build=False)
    load_backend("aoti", stranger, manifest, "cpu")  # into the cache, where auto finds it
    assert choose_backend(stranger, manifest, "cpu") == "aoti"


def test_a_damaged_engine_in_the_cache_is_passed_over(one_block_bundle: Path, fake_aoti: Any, tmp_path: Path) -> None:
    manifest = open_bundle(one_block_bundle).model_copy(update={"tuned": [tuned_to("aoti")]})
    load_backend("aoti", one_block_bundle, manifest, "cpu")
    (path,) = fake_aoti.opened
    path.write_text("damaged")
    heard = Heard()
    assert choose_backend(one_block_bundle, manifest, "cpu", heard) == "onnxruntime"
    assert "is not the engine that was built" in heard.messages[0]


def test_the_help_names_every_backend_and_both_orders() -> None:
    text = Backend.__metadata__[0].help  # type: ignore[attr-defined]
    words = {word.strip(",.") for word in text.split()}
    assert words >= {"auto", *BACKENDS}
    for kind, name in (("cuda", "CUDA"), ("cpu", "a CPU")):
        assert f"{', '.join(ORDER[kind])} on {name}" in text
        assert ", ".join(ORDER[kind]) in (choose_backend.__doc__ or "")
