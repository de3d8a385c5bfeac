"""Hostile bundles: whatever somebody writes into a manifest and hashes rightly, loading it ends in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from obsdiff.errors import InputError
from obsdiff.export.bundle import WEIGHTS, Manifest, list_files, open_bundle, read_manifest
from obsdiff.files import write_json
from obsdiff.runtime.pipeline import load

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(graphless: Path, tmp_path: Path) -> Path:
    """A bundle that the test may break."""
    return Path(shutil.copytree(graphless, tmp_path / "bundle"))


def change_manifest(bundle: Path, change: Change) -> None:
    value = json.loads((bundle / "manifest.json").read_text())
    change(value)
    (bundle / "manifest.json").write_text(json.dumps(value))


def list_anew(bundle: Path) -> None:
    """Gives changed files their right hashes, as somebody who means harm would."""
    files = {name: file.model_dump() for name, file in list_files(bundle).items()}
    change_manifest(bundle, lambda value: value.update(files=files))


def assert_refused(action: Callable[[], object], pattern: str) -> None:
    """One sentence, on one line, that says what was expected of it."""
    with pytest.raises(InputError, match=pattern) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000


LEAVING = (
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "//server/share",
    "C:\\Windows",
    "C:/Windows",
    "C:x",
    "..\\x",
    "a\\b",
    "\\\\server\\share",
    ".",
    "",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 5000,
)


@pytest.mark.parametrize("path", LEAVING)
def test_paths_that_leave_the_folder_are_refused(bundle: Path, path: str) -> None:
    file = read_manifest(bundle).files[WEIGHTS].model_dump()
    change_manifest(bundle, lambda value: value["files"].update({path: file}))
    assert_refused(lambda: open_bundle(bundle), "is not a manifest that obsdiff wrote")


PATHS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("./\\:aC~ \0\n"), max_size=12),
    st.lists(st.sampled_from(["..", ".", "", "a", "C:", "~", "model.onnx", "x" * 300]), max_size=6).map("/".join),
)


@settings(max_examples=300, deadline=None)
@given(PATHS)
def test_no_path_leads_out_of_the_folder(graphless: Path, path: str) -> None:
    """Either the manifest is refused, or the path stays inside; and opening never fails in another way."""
    value = read_manifest(graphless).model_dump(mode="json")
    value["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    try:
        manifest = TypeAdapter(Manifest).validate_python(value)
    except ValidationError:
        return
    assert path in manifest.files
    parts = PurePosixPath(path).parts
    assert ".." not in parts
    assert (Path("/bundle") / path).is_relative_to("/bundle")
    assert not set(path) & set("\\\0")


@settings(max_examples=60, deadline=None)
@given(PATHS)
def test_hostile_paths_get_one_sentence(graphless: Path, tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    value = json.loads((graphless / "manifest.json").read_text())
    value["files"] = {path: {"bytes": 1, "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        open_bundle(folder)
    assert len(str(caught.value).splitlines()) == 1


GROUP = {"block": 0, "name": "ff", "kind": "neurons", "kept": [0, 1], "of": 128}


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(groups=[GROUP]),  # fits the module, not the weights
        lambda value: value.update(groups=[GROUP | {"block": 7}]),
        lambda value: value.update(groups=[GROUP | {"block": -1}]),
        lambda value: value.update(groups=[GROUP | {"name": "__class__"}]),
        lambda value: value.update(groups=[GROUP | {"kept": []}]),
        lambda value: value.update(groups=[GROUP | {"kept": [128]}]),
        lambda value: value.update(groups=[GROUP | {"of": 2**80}]),
        lambda value: value.update(groups=[GROUP | {"kind": "layers"}]),
        lambda value: value.update(groups="ff"),
    ],
)
def test_groups_that_do_not_fit_the_weights_are_refused(bundle: Path, change: Change) -> None:
    change_manifest(bundle, change)
    assert_refused(lambda: load(bundle), "bundle|transformer_blocks")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(axes={}),
        lambda value: value["axes"].pop("tokens"),
        lambda value: value["axes"]["batch"].update(min=0),
        lambda value: value["axes"]["batch"].update(max=0),
        lambda value: value["axes"]["batch"].update(min=9, opt=2),
        lambda value: value["axes"]["batch"].update(multiple=0),
        lambda value: value.update(components=["vae"]),
        lambda value: value["components"].append("../vae"),
        lambda value: value.update(component="vae"),
        lambda value: value.update(component="__init__"),
        lambda value: value.update(pipeline="FluxPipeline"),
        lambda value: value.update(pipeline="os.system"),
        lambda value: value.update(denoiser="torch.load"),
        lambda value: value.update(denoiser="AutoencoderKL"),
        lambda value: value.update(inputs=[]),
        lambda value: value["inputs"].pop(),
        lambda value: value["inputs"][0].update(name="shell"),
        lambda value: value["inputs"][0].update(axes=["batch", 8, "height", "depth"]),
        lambda value: value.update(outputs=[]),
        lambda value: value.update(outputs=value["outputs"] * 2),
        lambda value: value.update(precision="int8"),
        lambda value: value.update(vae_scale=0),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_manifest_of_another_pipeline_is_refused(
    one_block_bundle: Path, tmp_path: Path, backend: str, change: Change
) -> None:
    bundle = Path(shutil.copytree(one_block_bundle, tmp_path / "bundle"))
    change_manifest(bundle, change)
    assert_refused(lambda: load(bundle, backend=backend), str(tmp_path))


def test_a_model_index_that_names_other_classes_is_refused(bundle: Path) -> None:
    index = json.loads((bundle / "model_index.json").read_text())
    for entry in (["os", "system"], ["builtins", "exec"], "transformer", ["diffusers", "NoSuchClass"]):
        write_json(bundle / "model_index.json", index | {"vae": entry})
        list_anew(bundle)
        assert_refused(lambda: load(bundle), "bundle")


def test_a_model_index_of_another_pipeline_is_refused(bundle: Path) -> None:
    index = json.loads((bundle / "model_index.json").read_text())
    for name in ("FluxPipeline", "NoSuchPipeline", ["pipeline", "Custom"], None):
        write_json(bundle / "model_index.json", index | {"_class_name": name})
        list_anew(bundle)
        assert_refused(lambda: load(bundle), "bundle")


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"num_layers": "many"}', '{"num_layers": 2}'])
def test_a_denoiser_config_that_does_not_fit_is_refused(bundle: Path, content: str) -> None:
    (bundle / "denoiser" / "config.json").write_text(content)
    list_anew(bundle)
    assert_refused(lambda: load(bundle, backend="torch"), "bundle")


def test_weights_that_are_no_safetensors_are_refused(bundle: Path) -> None:
    for content in (b"", b"not tensors", (bundle / WEIGHTS).read_bytes()[:-8]):
        (bundle / WEIGHTS).write_bytes(content)
        list_anew(bundle)
        assert_refused(lambda: load(bundle, backend="torch"), "bundle")
