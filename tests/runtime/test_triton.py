"""obsdiff triton: what the repository says of the bundle, and that it is written whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import model_config
import numpy as np
import onnxruntime
import pytest
from cli import Result, assert_sentence, call, tree
from disk import full_disk

from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest, open_bundle, read_manifest
from obsdiff.runtime import triton
from obsdiff.runtime.triton import write_repository


def config(model: Path) -> dict[str, Any]:
    return model_config.parse((model / "config.pbtxt").read_text(encoding="utf-8"))


def parameters(model: Path) -> dict[str, str]:
    return {entry["key"]: entry["value"]["string_value"] for entry in config(model)["parameters"]}


def write(bundle: Path, repo: Path, *options: object) -> Result:
    return call("triton", bundle, repo, *options)


def test_the_repository_names_the_bundle_and_what_the_model_takes(graphless: Path, tmp_path: Path) -> None:
    result = write(graphless, tmp_path / "new" / "repo", "--instances", 2, "--json")
    assert result.code == 0, result.err
    (record,) = result.json["models"]
    model = tmp_path / "new" / "repo" / "graphless"
    assert (record["folder"], record["name"], record["backend"]) == (str(model), "graphless", "python")
    assert set(tree(model)) == {"config.pbtxt", "1", "1/model.py"}
    assert [path.name for path in model.parent.iterdir()] == ["graphless"]
    found = config(model)
    assert (found["name"], found["backend"]) == ("graphless", "python")
    assert found["instance_group"] == [{"count": 2}], "KIND_AUTO, which is 0: the GPUs where there are some"
    assert {entry["name"]: entry["data_type"] for entry in found["input"]} == triton.INPUTS
    assert [entry["name"] for entry in found["input"] if not entry.get("optional")] == ["prompt", "seed"]
    assert all(entry["dims"] == ["1"] for entry in found["input"])
    assert found["output"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["-1", "-1", "3"]}]
    assert int(found["dynamic_batching"]["max_queue_delay_microseconds"]) > 0
    assert found["dynamic_batching"]["default_queue_policy"]["max_queue_size"] > 0
    assert parameters(model) == {"bundle": str(graphless.resolve()), "backend": "auto"}
    (tmp_path / "plain").mkdir()
    assert model.stat().st_mode == (tmp_path / "plain").stat().st_mode, "another user's server reads it"


def test_a_batch_is_what_the_bundle_was_exported_for(graphless: Path, tmp_path: Path) -> None:
    manifest = read_manifest(graphless)
    pictures = manifest.axes["batch"].max // 2  # with guidance a picture takes two
    assert write(graphless, tmp_path, "--name", "most").code == 0
    assert config(tmp_path / "most")["max_batch_size"] == pictures
    assert write(graphless, tmp_path, "--name", "few", "--max-batch-size", 3).code == 0
    assert config(tmp_path / "few")["max_batch_size"] == 3
    result = write(graphless, tmp_path, "--name", "many", "--max-batch-size", pictures + 1)
    assert_sentence(result, 2, "--max-batch-size", f"{pictures} pictures")
    assert {path.name for path in tmp_path.iterdir()} == {"most", "few"}


@pytest.mark.parametrize(
    ("device", "group", "given"),
    [
        ("cpu", {"count": 1, "kind": "KIND_CPU"}, "cpu"),
        ("cuda", {"count": 1, "kind": "KIND_GPU"}, None),
        ("cuda:1", {"count": 1, "kind": "KIND_GPU", "gpus": [1]}, None),
    ],
)
def test_the_device_becomes_the_instances_kind(
    graphless: Path, tmp_path: Path, device: str, group: dict[str, Any], given: str | None
) -> None:
    write_repository(graphless, tmp_path, name="m", device=device)
    assert config(tmp_path / "m")["instance_group"] == [group]
    assert parameters(tmp_path / "m").get("device") == given


def test_a_copied_bundle_is_complete_and_named_from_the_version(one_block_bundle: Path, tmp_path: Path) -> None:
    assert write(one_block_bundle, tmp_path, "--name", "m", "--copy", "--backend", "onnxruntime").code == 0
    assert parameters(tmp_path / "m") == {"bundle": "bundle", "backend": "onnxruntime"}
    assert open_bundle(tmp_path / "m" / "1" / "bundle") == open_bundle(one_block_bundle)


def random_inputs(manifest: Manifest, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    return {
        entry.name: drawn.random([sizes.get(str(axis), axis) for axis in entry.axes]).astype(entry.dtype)  # type: ignore[misc]
        for entry in manifest.inputs
    }


def test_the_denoisers_config_is_true_of_its_graph(one_block_bundle: Path, tmp_path: Path) -> None:
    assert write(one_block_bundle, tmp_path, "--name", "m", "--denoiser").code == 0
    model = tmp_path / "m-denoiser"
    found, manifest = config(model), read_manifest(one_block_bundle)
    assert (found["backend"], found["max_batch_size"]) == ("onnxruntime", manifest.axes["batch"].max)
    session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    for side, real in (("input", session.get_inputs()), ("output", session.get_outputs())):
        by_name = {entry["name"]: entry for entry in found[side]}
        assert set(by_name) == {entry.name for entry in real}
        for entry in real:
            written = by_name[entry.name]
            dims = [] if "reshape" in written else [int(size) for size in written["dims"]]
            assert dims == [size if isinstance(size, int) else -1 for size in entry.shape[1:]]
            assert not isinstance(entry.shape[0], int), "Triton's batch"
            assert {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}[entry.type] == written["data_type"]
    values = random_inputs(manifest, {"batch": 3, "height": 6, "width": 4, "tokens": 5})
    assert session.run(None, values)[0].shape == (3, 8, 6, 4)


def test_a_batch_that_a_graph_lacks_is_an_axis_like_others(one_block_bundle: Path) -> None:
    manifest = read_manifest(one_block_bundle)
    first, *rest = manifest.inputs
    odd = manifest.model_copy(update={"inputs": [first.model_copy(update={"axes": (8, "height")}), *rest]})
    found = model_config.parse("\n".join(triton.pbtxt(triton.denoiser_config("m", odd, {"count": 1}))))
    assert "max_batch_size" not in found
    assert "dynamic_batching" not in found
    assert found["input"][0]["dims"] == ["8", "-1"]
    assert found["output"][0]["dims"] == ["-1", "8", "-1", "-1"]
    bf16 = manifest.model_copy(update={"inputs": [first.model_copy(update={"dtype": "bfloat16"}), *rest]})
    with pytest.raises(InputError, match="bfloat16"):
        triton.denoiser_config("m", bf16, {})


def test_a_relative_path_is_written_whole(graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(graphless.parent)
    assert write(Path(graphless.name), tmp_path, "--name", "m").code == 0
    assert parameters(tmp_path / "m")["bundle"] == str(graphless.resolve())


def test_any_path_survives_the_config(graphless: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(graphless, tmp_path / 'quo"te \\ new\nline été 🥾')
    assert write(bundle, tmp_path / "repo", "--name", "m").code == 0
    assert parameters(tmp_path / "repo" / "m")["bundle"] == str(bundle.resolve())
    assert_sentence(write(bundle, tmp_path / "other"), 2, "--name")
    assert not (tmp_path / "other").exists()
    unreadable = shutil.copytree(graphless, tmp_path / "caf\udce9")
    assert_sentence(write(unreadable, tmp_path / "other", "--name", "m"), 2, "Unicode", "--copy")
    assert not (tmp_path / "other").exists()
    assert write(unreadable, tmp_path / "other", "--name", "m", "--copy").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--name", "../m"), ("'../m'", "--name")),
        (("--name", ""), ("''", "--name")),
        (("--name", ".hidden"), ("'.hidden'",)),
        (("--name", "m" * 101), ("--name",)),
        (("--name", "a/b"), ("'a/b'",)),
        (("--name", "m", "--backend", "abacus"), ("abacus", "onnxruntime")),
        (("--name", "m", "--backend", "onnxruntime"), ("no ONNX graph", "--format onnx")),
        (("--name", "m", "--denoiser"), ("no ONNX graph", "--format onnx")),
        (("--name", "m", "--device", "cuda:x"), ("cuda:x",)),
        (("--name", "m", "--device", "tpu"), ("tpu",)),
        (("--name", "m", "--device", ""), ("--device",)),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    graphless: Path, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_sentence(write(graphless, tmp_path / "deep" / "repo", *options), 2, *words)
    assert not tree(tmp_path)


@pytest.mark.parametrize("what", ["missing", "model", "damaged"])
def test_only_a_sound_bundle_is_taken(graphless: Path, tmp_path: Path, what: str) -> None:
    bundle = tmp_path / "bundle"
    if what == "model":
        bundle.mkdir()
    elif what == "damaged":
        shutil.copytree(graphless, bundle)
        (bundle / "vae" / "config.json").write_text("{}")
    word = {"missing": "does not exist", "model": "not a bundle", "damaged": "SHA-256"}[what]
    assert_sentence(write(bundle, tmp_path / "repo"), 2, word)
    assert not (tmp_path / "repo").exists()


def test_a_model_is_kept_unless_forced(one_block_bundle: Path, graphless: Path, tmp_path: Path) -> None:
    assert write(one_block_bundle, tmp_path, "--name", "m", "--denoiser").code == 0
    before = tree(tmp_path)
    assert_sentence(write(graphless, tmp_path, "--name", "m"), 2, "exists already", "--force")
    (tmp_path / "m").rename(tmp_path / "n")
    assert_sentence(write(one_block_bundle, tmp_path, "--name", "m", "--denoiser"), 2, "m-denoiser", "--force")
    (tmp_path / "n").rename(tmp_path / "m")
    assert tree(tmp_path) == before
    assert write(graphless, tmp_path, "--name", "m", "--force").code == 0
    assert parameters(tmp_path / "m")["bundle"] == str(graphless.resolve())
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m-denoiser"}


def test_nothing_that_is_not_a_model_is_replaced(graphless: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name in ("m", "link", "file"):
        assert_sentence(write(graphless, tmp_path, "--name", name, "--force"), 2, "no model of Triton")
    assert_sentence(write(graphless, tmp_path / "file", "--name", "m"), 2, "is a file")
    assert tree(tmp_path) == before


def test_a_bundle_is_neither_written_into_nor_replaced(graphless: Path, tmp_path: Path) -> None:
    assert write(graphless, tmp_path, "--name", "m", "--copy").code == 0
    copied = tmp_path / "m" / "1" / "bundle"
    before = tree(tmp_path)
    assert_sentence(write(copied, tmp_path, "--name", "m", "--force"), 2, "would be replaced")
    assert_sentence(write(copied, copied / "repo", "--name", "m"), 2, "inside the bundle")
    assert_sentence(write(copied, copied, "--name", "m"), 2, "inside the bundle")
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_what_was_there(one_block_bundle: Path, tmp_path: Path) -> None:
    assert write(one_block_bundle, tmp_path / "repo", "--name", "m").code == 0
    before = tree(tmp_path)
    with full_disk(5000):
        results = [
            write(one_block_bundle, tmp_path / "repo", "--name", "m", "--copy", "--force"),
            write(one_block_bundle, tmp_path / "repo", "--name", "m", "--denoiser", "--force"),
            write(one_block_bundle, tmp_path / "new", "--name", "m", "--copy"),
        ]
    for result in results:
        assert_sentence(result, 1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", ["m", "m-denoiser"])
def test_both_models_take_their_places_or_neither(
    one_block_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    assert write(one_block_bundle, tmp_path, "--name", "m", "--denoiser").code == 0
    before, rename = tree(tmp_path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == tmp_path / failing and not self.name.endswith(".replaced"):
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    result = write(one_block_bundle, tmp_path, "--name", "m", "--denoiser", "--instances", 3, "--force")
    assert_sentence(result, 1, "Permission denied")
    assert tree(tmp_path) == before
