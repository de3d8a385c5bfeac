"""Pictures: seeds that do not depend on the batch, files with their own story, and names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from obsdiff.errors import InputError
from obsdiff.files import sha256
from obsdiff.runtime.generate import call_options, generate, identity, output_paths, save_png
from obsdiff.runtime.pipeline import load

PROMPTS = ["a red ankle boot", "teal trousers", "a yellow dress", "a red ankle boot"]
SEEDS = [7, 0, 2**63, 7]


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def pipe(request: pytest.FixtureRequest, one_block_bundle: Path) -> Any:
    return load(one_block_bundle, backend=request.param)


@pytest.fixture
def options(pipe: Any) -> dict[str, Any]:
    return call_options(pipe, "fashion", {"num_inference_steps": 3})


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(pipe: Any, options: dict[str, Any]) -> None:
    together = generate(pipe, PROMPTS, SEEDS, options, "latent")
    alone = [generate(pipe, [prompt], [seed], options, "latent") for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    turned = generate(pipe, PROMPTS[::-1], SEEDS[::-1], options, "latent").flip(0)
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[3], together[0], rtol=1e-4, atol=1e-4)
    other = generate(pipe, PROMPTS[:1], [8], options, "latent")
    assert (other - together[:1]).abs().max() > 0.1


def test_the_same_call_gives_the_same_picture(pipe: Any, options: dict[str, Any]) -> None:
    first, second = (generate(pipe, PROMPTS, SEEDS, options) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    assert {image.size for image in first} == {(32, 32)}


def test_output_types_are_one_picture(pipe: Any, options: dict[str, Any]) -> None:
    images = generate(pipe, PROMPTS, SEEDS, options)
    tensors = generate(pipe, PROMPTS, SEEDS, options, "pt")
    assert tensors.dtype == torch.float32
    assert 0 <= tensors.min() < tensors.max() <= 1
    for image, tensor in zip(images, tensors, strict=True):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
        assert (pixels.float() - tensor * 255).abs().max() <= 0.51


def test_one_negative_prompt_holds_for_every_picture(pipe: Any, options: dict[str, Any]) -> None:
    without = generate(pipe, PROMPTS[:2], SEEDS[:2], options, "latent")
    both = generate(pipe, PROMPTS[:2], SEEDS[:2], {**options, "negative_prompt": "a blue bag"}, "latent")
    alone = generate(pipe, PROMPTS[1:2], SEEDS[1:2], {**options, "negative_prompt": "a blue bag"}, "latent")
    assert (both - without).flatten(1).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [-(2**64), 2**64, 2**80])
def test_a_seed_that_torch_does_not_take_is_one_sentence(pipe: Any, options: dict[str, Any], seed: int) -> None:
    with pytest.raises(InputError, match=rf"seed {seed} .*2\*\*64"):
        generate(pipe, PROMPTS[:1], [seed], options)


@pytest.mark.parametrize(("change", "pattern"), [({"height": 33}, "divisible"), ({"width": 12}, "divisible")])
def test_what_the_pipeline_refuses_is_bad_input(
    pipe: Any, options: dict[str, Any], change: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(InputError, match=pattern):
        generate(pipe, PROMPTS[:1], SEEDS[:1], {**options, **change})


def test_png_files_carry_their_metadata(tmp_path: Path) -> None:
    metadata = {"prompt": "ein roter Stiefel — 紅靴 🥾\nzwei", "seed": 2**63, "bundle": "sha256:00", "steps": 20}
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    save_png(image, tmp_path / "boot.png", metadata)
    with Image.open(tmp_path / "boot.png") as found:
        assert found.format == "PNG"
        assert found.tobytes() == image.tobytes()
        assert found.text == {key: str(value) for key, value in metadata.items()}
    save_png(image, tmp_path / "boot.png", {})
    with Image.open(tmp_path / "boot.png") as found:
        assert found.text == {}
    assert [path.name for path in tmp_path.iterdir()] == ["boot.png"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    save_png(image, tmp_path / "boot.png", {})
    before = (tmp_path / "boot.png").read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(image.convert("LAB"), tmp_path / "boot.png", {})
    assert (tmp_path / "boot.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["boot.png"]


def test_identity_names_what_drew(graphless: Path, pruned: dict[str, Path], one_block_sd3: Path) -> None:
    assert identity(graphless) == f"sha256:{sha256(graphless / 'manifest.json')}"
    assert identity(str(pruned["2:4"])) == f"sha256:{sha256(pruned['2:4'] / 'obsdiff.json')}"
    assert identity(pruned["2:4"]) != identity(pruned["structured"])
    assert identity("fashion") == "fashion"
    assert identity(one_block_sd3) == str(one_block_sd3)


@pytest.mark.parametrize(
    ("out", "count", "names"),
    [
        ("boot.png", 1, ["boot.png"]),
        ("boot.png", 3, ["boot-0.png", "boot-1.png", "boot-2.png"]),
        ("BOOT.PNG", 1, ["BOOT.PNG"]),
        ("BOOT.PNG", 2, ["BOOT-0.png", "BOOT-1.png"]),
        ("a/b.c.png", 2, ["a/b.c-0.png", "a/b.c-1.png"]),
        ("boots", 1, ["boots/0.png"]),
        ("boots.v2", 2, ["boots.v2/0.png", "boots.v2/1.png"]),
        (".png", 1, [".png/0.png"]),
    ],
)
def test_a_name_is_a_file_or_a_folder(out: str, count: int, names: list[str]) -> None:
    assert output_paths(Path(out), count) == [Path(name) for name in names]


@pytest.mark.parametrize("name", ["z.jpg", "z.JPEG", "a/z.webp", "z.gif", "z.bmp", "z.tif", "z.tiff"])
def test_pictures_of_another_kind_are_refused(name: str) -> None:
    wanted = str(Path(name).with_suffix(".png"))
    with pytest.raises(InputError, match=f"--out {name}: pictures are written as PNG; name it {wanted}, or a folder"):
        output_paths(Path(name), 1)
    assert output_paths(Path(".jpg"), 1) == [Path(".jpg/0.png")]


def test_defaults_that_are_no_object_are_refused(pipe: Any, tmp_path: Path) -> None:
    assert call_options(pipe, tmp_path, {"height": 16}) == {"height": 16}
    for value in ([1], "x", None):
        (tmp_path / "generation_config.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match=r"generation_config\.json"):
            call_options(pipe, tmp_path)
