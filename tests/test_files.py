"""Files: whole or not at all, whatever goes wrong while one is written; hashes of folders; copies."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import full_disk
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.files import (
    CHUNK,
    copy_files,
    folder_files,
    folder_hash,
    read_json,
    sha256,
    whole,
    write_json,
    write_tensors,
)


def make_folder(folder: Path) -> Path:
    for name, text in {
        "a.json": "{}",
        "unet/b.bin": "b",
        "vae/unet/c.txt": "c",
        ".hidden/d": "d",
        "unet/.e": "e",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_body_that_ends_well_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path, "a rename is only atomic within one file system"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["value.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["old", None])
def test_a_body_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "value.txt"
    if before:
        path.write_text(before)

    def fail_half_way() -> None:
        with whole(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert [(name, (tmp_path / name).read_text()) for name in os.listdir(tmp_path)] == (
        [("value.txt", before)] if before else []
    )


def test_a_body_that_writes_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole(path):
        pass
    assert path.read_text() == "old"


def test_a_part_that_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    (tmp_path / ".value.json.part").write_text("half of a much longer text that was never finished")
    write_json(path, [1])
    assert os.listdir(tmp_path) == ["value.json"]
    assert read_json(path) == [1]


def test_a_full_disk_keeps_the_old_json(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": True})
    with full_disk(10_000), pytest.raises(OSError, match="too large"):
        write_json(path, ["x" * 100] * 1000)
    assert os.listdir(tmp_path) == ["value.json"]
    assert read_json(path) == {"old": True}


def test_a_full_disk_keeps_the_old_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    with full_disk(10_000), pytest.raises((ObsdiffError, OSError)):
        write_tensors(path, {"a": torch.zeros(100_000)})
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
    write_tensors(path, tensors, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.stat().st_mode & 0o777 == 0o644, "another user's server must be able to read it"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=JSON)
def test_json_comes_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b"not json", b"\xff\xfe\x00", b"[" * 100_000, b"PK\x03\x04"],
    ids=["empty", "truncated", "text", "binary", "deep", "zip"],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"value\.json cannot be read as JSON"):
        read_json(path)


def test_a_json_file_that_is_missing_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"value\.json is missing"):
        read_json(tmp_path / "value.json")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(tmp_path)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_sha256_reads_all_of_a_file(tmp_path: Path, size: int) -> None:
    content = (b"0123456789abcdef!" * (size // 17 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_files_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    files = folder_files(make_folder(tmp_path / ".cache" / "model"))
    assert list(files) == ["a.json", "unet/b.bin", "vae/unet/c.txt"]
    assert [path.read_text() for path in files.values()] == ["{}", "b", "c"]


def test_links_to_files_count_as_in_the_hubs_snapshots(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "1")
    before = folder_hash(folder)
    (blobs / "1").write_text("[]")
    assert list(folder_files(folder)) == ["config.json"]
    assert folder_hash(folder) != before


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda f: (f / "a.json").write_text("{ }"), True),
        (lambda f: (f / "a.json").rename(f / "A.json"), True),
        (lambda f: (f / "unet/b.bin").rename(f / "b.bin"), True),
        (lambda f: (f / "unet/b.bin").unlink(), True),
        (lambda f: (f / "empty").touch(), True),
        (lambda f: (f / "vae/unet/c.txt").write_text((f / "unet/b.bin").read_text()), True),
        (lambda f: os.utime(f / "a.json", (0, 0)), False),
        (lambda f: (f / ".git").write_text("x"), False),
        (lambda f: f.rename(f.with_name("moved")), False),
    ],
    ids=["content", "name", "place", "gone", "new", "same-as-another", "time", "hidden", "moved"],
)
def test_the_hash_of_a_folder_is_that_of_its_names_and_contents(tmp_path: Path, change: Any, differs: bool) -> None:
    folder = make_folder(tmp_path / "model")
    before = folder_hash(folder)
    assert before == folder_hash(make_folder(tmp_path / "twin"))
    change(folder)
    after = folder_hash(folder if folder.exists() else folder.with_name("moved"))
    assert (after != before) == differs


def test_copying_leaves_out_top_level_names_alone(tmp_path: Path) -> None:
    source, target = make_folder(tmp_path / "model"), tmp_path / "copy"
    copy_files(source, target, skip=("unet",))
    assert list(folder_files(target)) == ["a.json", "vae/unet/c.txt"]
    copy_files(source, target)
    assert folder_hash(target) == folder_hash(source)
    assert not (target / ".hidden").exists()


def test_a_full_disk_while_copying_is_an_error_and_the_source_stays(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "model")
    (source / "weights").write_bytes(bytes(50_000))
    before = folder_hash(source)
    with full_disk(10_000), pytest.raises(OSError, match="too large"):
        copy_files(source, tmp_path / "copy")
    assert folder_hash(source) == before


def test_what_is_written_is_readable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"prompt": "une botte à lacets"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "à" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"prompt": "une botte à lacets"}
