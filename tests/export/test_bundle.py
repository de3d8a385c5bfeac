"""Bundles: what is verified on load, and one sentence for whatever is wrong with a folder or its manifest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.export.bundle import SCHEMA_VERSION, WEIGHTS, open_bundle, read_manifest
from obsdiff.export.schema import Axis
from obsdiff.files import sha256, write_json
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


def assert_refused(action: Callable[[], object], pattern: str) -> None:
    """One sentence, on one line, that says what was expected of it."""
    with pytest.raises(InputError, match=pattern) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000


def test_a_manifest_comes_back_as_it_was_written(bundles: dict[str, Path], tmp_path: Path) -> None:
    for path in bundles.values():
        manifest = read_manifest(path)
        write_json(tmp_path / "manifest.json", manifest.model_dump(mode="json"))
        assert read_manifest(tmp_path) == manifest
        assert (tmp_path / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()


def test_the_manifest_lists_every_file_with_its_hash(bundles: dict[str, Path]) -> None:
    for path in bundles.values():
        manifest = open_bundle(path)
        found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        assert set(found) == {*manifest.files, "manifest.json"}
        for name, file in manifest.files.items():
            assert (file.bytes, file.sha256) == (found[name].stat().st_size, sha256(found[name]))


def test_the_manifest_says_what_the_engine_takes(bundles: dict[str, Path]) -> None:
    manifest = open_bundle(bundles["structured"])
    assert {entry.name: (entry.dtype, entry.axes) for entry in manifest.inputs} == {
        "hidden_states": ("float32", ("batch", 8, "height", "width")),
        "encoder_hidden_states": ("float32", ("batch", "tokens", 128)),
        "pooled_projections": ("float32", ("batch", 128)),
        "timestep": ("float32", ("batch",)),
    }
    assert [(entry.dtype, entry.axes) for entry in manifest.outputs] == [("float32", ("batch", 8, "height", "width"))]
    assert manifest.axes["batch"] == Axis(min=1, opt=2, max=16)
    assert manifest.axes["height"] == manifest.axes["width"] == Axis(min=4, opt=8, max=12, multiple=2)
    assert manifest.recipe is not None
    assert manifest.recipe["pattern"] == "structured"
    assert manifest.groups


@pytest.mark.parametrize(
    ("size", "allowed"), [(3, False), (4, True), (5, False), (6, True), (12, True), (13, False), (14, False)]
)
def test_an_axis_allows_its_range_in_steps(size: int, allowed: bool) -> None:
    assert Axis(min=4, opt=8, max=12, multiple=2).allows(size) is allowed


def test_one_byte_that_changed_is_noticed(bundle: Path) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / WEIGHTS).write_bytes(data)
    assert_refused(lambda: open_bundle(bundle), rf"{WEIGHTS} is not the file that was exported")


def test_a_truncated_file_is_noticed(bundle: Path) -> None:
    data = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(data[:-1])
    assert_refused(lambda: load(bundle), rf"{WEIGHTS} is not the file that was exported")


def test_a_wrong_hash_in_the_manifest_is_noticed(bundle: Path) -> None:
    change_manifest(bundle, lambda value: value["files"][WEIGHTS].update(sha256="0" * 64))
    assert_refused(lambda: load(bundle), rf"{WEIGHTS} is not the file that was exported")


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "model_index.json").unlink()
    assert_refused(lambda: open_bundle(bundle), r"model_index.json is in the manifest and missing")


@pytest.mark.parametrize("name", ["model_index.json", WEIGHTS, "denoiser/config.json", "vae/config.json"])
def test_a_file_that_the_manifest_leaves_out_is_not_trusted(bundle: Path, name: str) -> None:
    change_manifest(bundle, lambda value: value["files"].pop(name))
    assert_refused(lambda: load(bundle), name)


def test_a_file_that_was_added_is_not_trusted(bundle: Path) -> None:
    shutil.copy(bundle / "vae" / "diffusion_pytorch_model.safetensors", bundle / "vae" / "other.safetensors")
    assert_refused(lambda: load(bundle), r"vae/other\.safetensors is not in the manifest")


def test_a_picture_beside_the_manifest_is_no_reason_to_refuse(bundle: Path) -> None:
    (bundle / "boot.png").write_bytes(b"a picture")
    open_bundle(bundle)


def test_a_graph_that_the_manifest_leaves_out_is_not_run(one_block_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(one_block_bundle, tmp_path / "bundle"))
    change_manifest(bundle, lambda value: value["files"].pop("denoiser/model.onnx"))
    assert_refused(lambda: load(bundle, backend="onnxruntime"), r"does not list denoiser/model\.onnx")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(bundle: Path, tmp_path: Path, kind: str) -> None:
    inside, outside = (
        (bundle / "vae" / "config.json", tmp_path / "x") if kind == "file" else (bundle / "vae", tmp_path / "y")
    )
    inside.rename(outside)
    inside.symlink_to(outside)
    assert_refused(lambda: load(bundle), r"vae/config.json is a link that leaves the bundle")


def test_a_link_to_a_whole_bundle_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link") == open_bundle(str(bundle))


@pytest.mark.parametrize(
    ("path", "content", "pattern"),
    [
        (".", None, "is not a bundle: it has no manifest.json"),
        ("manifest.json", None, "does not exist or is no folder"),
        (".", "{", "cannot be read as JSON"),
        (".", "", "cannot be read as JSON"),
        (".", b"\xff\xfe\x00", "cannot be read as JSON"),
        (".", "[]", "is not a manifest"),
        (".", "null", "is not a manifest"),
        (".", "{}", "is not a manifest"),
        (".", '{"schema_version": 1}', "is not a manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, path: str, content: str | bytes | None, pattern: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(lambda: open_bundle(tmp_path / path), pattern)


def test_a_newer_schema_asks_for_an_upgrade(bundle: Path) -> None:
    change_manifest(bundle, lambda value: value.update(schema_version=SCHEMA_VERSION + 1, news=True))
    assert_refused(lambda: load(bundle), rf"schema version {SCHEMA_VERSION + 1}, newer than .* upgrade obsdiff")


@pytest.mark.parametrize("version", [0, -1, 1.5, "one", None, [1], {}])
def test_an_unknown_schema_is_refused(bundle: Path, version: object) -> None:
    change_manifest(bundle, lambda value: value.update(schema_version=version))
    assert_refused(lambda: load(bundle), "schema_version")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(surprise=1),
        lambda value: value["files"]["model_index.json"].update(mode=755),
        lambda value: value["axes"]["batch"].update(step=2),
        lambda value: value["totals"].update(flops=2),
    ],
)
def test_keys_that_nobody_knows_are_refused(bundle: Path, change: Change) -> None:
    change_manifest(bundle, change)
    assert_refused(lambda: load(bundle), "Extra inputs are not permitted")
