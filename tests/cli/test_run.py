"""obsdiff run: the picture of the issue, what its file carries, and pictures by name, seed and folder."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import full_disk
from PIL import Image

from cli import assert_sentence, call, tree
from obsdiff.measure import fashion

from .conftest import Journey

PROMPT = "a red ankle boot"
FAST = ("--steps", 2, "--device", "cpu")


def pixels(path: Path) -> torch.Tensor:
    """uint8 [1, 3, 32, 32]"""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        chunks: dict[str, str] = dict(image.text)  # type: ignore[attr-defined]
    return chunks


def test_the_path_of_the_issue_draws_a_red_ankle_boot(journey: Journey) -> None:
    assert journey.run.code == 0, journey.run.err
    assert journey.run.out.splitlines() == [str(journey.picture)]
    items, colours, _ = fashion.classify(pixels(journey.picture))
    assert fashion.ITEMS[int(items.argmax())] == "ankle boot"
    assert fashion.COLOURS[int(colours.argmax())] == "red"
    assert fashion.accuracy(pixels(journey.picture), [PROMPT]) == {"item_accuracy": 1, "colour_accuracy": 1}


def test_the_picture_carries_what_drew_it(journey: Journey) -> None:
    chunks = text_of(journey.picture)
    digest = hashlib.sha256((journey.bundle / "manifest.json").read_bytes()).hexdigest()
    assert (
        chunks.items()
        >= {
            "prompt": PROMPT,
            "seed": "0",
            "model": f"sha256:{digest}",
            "num_inference_steps": "20",
            "guidance_scale": "4.0",
        }.items()
    )


def test_the_same_seed_gives_the_same_file_and_seeds_count_on(journey: Journey, tmp_path: Path) -> None:
    several = call("run", journey.bundle, PROMPT, "a blue bag", "--out", tmp_path / "x.png", "--seed", 6, *FAST)
    assert several.out.split() == [str(tmp_path / "x-0.png"), str(tmp_path / "x-1.png")]
    single = call("run", journey.bundle, "a blue bag", "--out", tmp_path / "new" / "folder", "--seed", 7, *FAST)
    assert single.out.split() == [str(tmp_path / "new" / "folder" / "0.png")]
    assert (tmp_path / "x-1.png").read_bytes() == (tmp_path / "new" / "folder" / "0.png").read_bytes()
    other = call("run", journey.bundle, "a blue bag", "--out", tmp_path / "other.png", "--seed", 8, *FAST)
    assert other.code == 0
    assert not torch.equal(pixels(tmp_path / "other.png"), pixels(tmp_path / "x-1.png"))
    assert [text_of(tmp_path / f"x-{k}.png")["seed"] for k in (0, 1)] == ["6", "7"]


def test_json_tells_the_pictures_and_their_options(journey: Journey, tmp_path: Path) -> None:
    result = call(
        "run", journey.bundle, "une botte à lacets", "--out", tmp_path / "x.png", "--height", 48, "--width", 16,
        "--guidance-scale", 1, "--negative-prompt", "a bag", "--backend", "torch", *FAST, "--json",
    )  # fmt: skip
    found = result.json
    (picture,) = found["images"]
    assert (picture["file"], picture["prompt"], picture["seed"]) == (str(tmp_path / "x.png"), "une botte à lacets", 0)
    assert found["model"] == text_of(tmp_path / "x.png")["model"]
    assert text_of(tmp_path / "x.png")["prompt"] == "une botte à lacets"
    assert found["options"]["negative_prompt"] == "a bag"
    assert Image.open(tmp_path / "x.png").size == (16, 48)
    assert result.err.splitlines() == ["loading", "drawing une botte à lacets"]


@pytest.mark.parametrize("kind", ["fashion", "checkpoint"])
def test_models_and_checkpoints_draw_too(journey: Journey, tmp_path: Path, kind: str) -> None:
    path = "fashion" if kind == "fashion" else journey.checkpoint
    assert call("run", path, PROMPT, "--out", tmp_path / "x.png", "--steps", 8, "--device", "cpu").code == 0
    assert fashion.accuracy(pixels(tmp_path / "x.png"), [PROMPT]) == {"item_accuracy": 1, "colour_accuracy": 1}
    recipe = journey.checkpoint / "obsdiff.json"
    identity = "fashion" if kind == "fashion" else f"sha256:{hashlib.sha256(recipe.read_bytes()).hexdigest()}"
    assert text_of(tmp_path / "x.png")["model"] == identity


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--height", 4096), ("height 4096", "16 to 48 pixels in steps of 8")),
        (("--height", 20), ("height 20", "16 to 48 pixels in steps of 8")),
        (("--width", 36), ("width 36", "16 to 48 pixels in steps of 8")),
        (("--backend", "abacus"), ("abacus", "onnxruntime")),
        (("--device", "cpu:x"), ("cpu:x",)),
        (("--device", "tpu"), ("tpu",)),
    ],
    ids=str,
)
def test_what_the_bundle_cannot_do_is_one_sentence(
    journey: Journey, tmp_path: Path, options: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    result = call("run", journey.bundle, PROMPT, "--out", tmp_path / "new" / "x.png", "--steps", 1, *options)
    assert_sentence(result, 2, *words)
    assert not tree(tmp_path)


@pytest.mark.parametrize("options", [("--height", 1000), ("--width", 20), ("--out", "z.jpg")], ids=str)
def test_what_the_names_and_numbers_show_is_refused_before_anything_is_loaded(
    journey: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("run", journey.bundle, PROMPT, *options)
    assert_sentence(result, 2)
    assert "loading" not in result.err
    assert not tree(tmp_path)


@pytest.mark.parametrize("damage", ["hash", "newer", "outside", "truncated"])
def test_a_damaged_bundle_draws_nothing(graphless: Path, tmp_path: Path, damage: str) -> None:
    bundle = shutil.copytree(graphless, tmp_path / "bundle")
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    if damage == "hash":
        (bundle / "vae" / "config.json").write_text("{}")
    elif damage == "newer":
        manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    elif damage == "outside":
        manifest.write_text(text.replace('"vae/config.json"', '"../vae/config.json"'))
    else:
        manifest.write_text(text[:-20])
    word = {"hash": "SHA-256", "newer": "upgrade", "outside": "leaves the bundle", "truncated": "manifest.json"}
    assert_sentence(call("run", bundle, PROMPT, "--out", tmp_path / "x.png"), 2, word[damage])
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_keeps_the_old_picture(journey: Journey, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    picture.write_bytes(b"old")
    with full_disk(100):
        result = call("run", journey.bundle, PROMPT, "--out", picture, *FAST)
    assert_sentence(result, 1)
    assert tree(tmp_path) == {"x.png": b"old"}
