"""An eval: pictures of the same noise, figures, gates, what is refused, and what an interruption leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import obsdiff
from obsdiff.errors import InputError
from obsdiff.measure import drawing, quality
from obsdiff.measure.comparable import look
from obsdiff.measure.evaluate import evaluate
from obsdiff.measure.metrics import METRICS
from obsdiff.progress import Progress
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

QUICK: dict[str, Any] = {"num_images": 4, "num_inference_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval") / "out"


@pytest.fixture(scope="module")
def result(pruned: dict[str, Path], folder: Path) -> dict[str, Any]:
    paths = [pruned["2:4"], pruned["structured"]]
    gates = {"minimum": {"ssim": 0.0, "psnr": 1000.0}, "maximum": {"fid": 1000.0}}
    found = obsdiff.evaluate(paths, "fashion", out=folder, keep=2, **gates, **QUICK)
    return dict(found)


def test_every_path_has_the_figures_that_fit_the_model(result: dict[str, Any], pruned: dict[str, Path]) -> None:
    assert [row["name"] for row in result["results"]] == ["2-4", "structured"]
    assert [row["path"] for row in result["results"]] == [str(pruned["2:4"]), str(pruned["structured"])]
    both = {"latent_mse", "latent_error", "psnr", "ssim"}
    unpaired = {"item_accuracy", "colour_accuracy"}
    assert unpaired <= result["reference"]["metrics"].keys() <= METRICS.keys() - both
    for row in result["results"]:
        assert both | unpaired <= row["metrics"].keys()
        for name, figure in row["metrics"].items():
            assert figure["low"] <= figure["value"] <= figure["high"], name
            assert 1 <= figure["images"] <= 4
            assert figure["better"] == METRICS[name].better
        assert row["metrics"]["latent_error"]["value"] > 0
    assert "at least 128 images" in result["skipped"]["frechet_distance"]
    assert "at least 2048 images" in result["skipped"]["fid"]


def test_figures_are_those_of_pictures_drawn_by_hand(result: dict[str, Any], pruned: dict[str, Path]) -> None:
    settings = result["settings"]
    assert (settings["steps"], settings["guidance_scale"], settings["height"], settings["seeds"]) == (
        2,
        4,
        32,
        [0, 1, 2, 3],
    )
    assert settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    drawn = []
    for path in ("fashion", pruned["2:4"]):
        pipe = load(path, device="cpu")
        options = call_options(pipe, path, {"num_inference_steps": 2})
        drawn.append(quality.draw(pipe, settings["prompts"], settings["seeds"], options))
    figure = result["results"][0]["metrics"]["latent_error"]
    assert figure["value"] == pytest.approx(quality.latent_error(drawn[1], drawn[0]), rel=1e-3)


def test_the_folder_holds_the_result_and_its_first_pictures(result: dict[str, Any], folder: Path) -> None:
    assert json.loads((folder / "eval.json").read_text()) == result
    assert sorted(path.name for path in folder.iterdir()) == ["eval.json", "images"]
    for row in (result["reference"], *result["results"]):
        assert len(row["images"]) == 2
        for k, name in enumerate(row["images"]):
            picture = Image.open(folder / name)
            assert picture.size == (32, 32)
            assert picture.info["prompt"] == result["settings"]["prompts"][k]  # type: ignore[attr-defined]
    assert len(list(folder.rglob("*.png"))) == 6


def test_a_gate_that_was_skipped_is_closed(result: dict[str, Any]) -> None:
    met = {(gate["metric"], gate["path"].rpartition("/")[2]): gate["met"] for gate in result["gates"]}
    assert met == {(name, path): name == "ssim" for name in ("ssim", "psnr", "fid") for path in ("2-4", "structured")}
    assert all(gate["value"] is None for gate in result["gates"] if gate["metric"] == "fid")


def test_an_interrupted_eval_goes_on_after_what_was_drawn(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, loaded = tmp_path / "out", []

    def interrupted(path: Any, *rest: Any) -> Any:
        loaded.append(str(path))
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load(path, *rest)

    monkeypatch.setattr(drawing, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate([pruned["2:4"]], "fashion", out=out, metrics=["psnr"], **QUICK)
    kept = list((out / drawing.DRAWN).iterdir())
    assert len(kept) == 1
    whole = evaluate([pruned["2:4"]], "fashion", out=out, metrics=["psnr"], **QUICK)
    assert loaded == ["fashion", str(pruned["2:4"]), str(pruned["2:4"])]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert whole["results"] == [
        {**row, "images": whole["results"][0]["images"]}
        for row in evaluate([pruned["2:4"]], "fashion", metrics=["psnr"], **QUICK)["results"]
    ]


def test_other_settings_or_a_broken_file_are_drawn_anew(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = look([pruned["2:4"]])
    asked = drawing.Asked(["a bag"], range(1), {"num_inference_steps": 1, "height": 32, "width": 32}, 1, "auto", "cpu")
    other = drawing.Asked(["a bag"], range(1, 2), asked.options, 1, "auto", "cpu")
    progress = Progress()
    first, note = drawing.draw_subject(one, asked, tmp_path, progress)
    (file,) = (tmp_path / drawing.DRAWN).iterdir()
    drawing.draw_subject(one, other, tmp_path, progress)
    assert len(list((tmp_path / drawing.DRAWN).iterdir())) == 2
    file.write_bytes(b"broken")
    again, told = drawing.draw_subject(one, asked, tmp_path, progress)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(first.images[0]))
    monkeypatch.setattr(drawing, "load", None)  # the third time nothing is loaded
    kept, said = drawing.draw_subject(one, asked, tmp_path, progress)
    assert kept.latents.equal(first.latents)
    assert note == told == said == {"backend": "torch", "steps": 1, "guidance_scale": 4.0}


def changed(model: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy with other values in one of its JSON files."""
    shutil.copytree(model, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(
    one_block_sd3: Path, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "load", None)
    shifted = changed(one_block_sd3, tmp_path / "shifted", "scheduler/scheduler_config.json", shift=3.0)
    with pytest.raises(InputError, match=r"schedulers differ \(shift is 3.0 in one, 1.0 in the other\)"):
        evaluate([shifted], one_block_sd3, **QUICK)
    large = changed(one_block_sd3, tmp_path / "large", "generation_config.json", height=64)
    with pytest.raises(InputError, match="its height is 64, the reference's 32; give --height for both"):
        evaluate([large], one_block_sd3, **QUICK)
    euler = changed(
        one_block_sd3, tmp_path / "euler", "scheduler/scheduler_config.json", _class_name="EulerDiscreteScheduler"
    )
    with pytest.raises(InputError, match="class is EulerDiscreteScheduler in one"):
        evaluate([euler], one_block_sd3, **QUICK)
    with pytest.raises(InputError, match="it is a FluxPipeline, the reference a StableDiffusion3Pipeline"):
        evaluate([tiny_model("flux")], one_block_sd3, **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["beauty"]}, "there is no metric beauty: there are latent_mse"),
        ({"minimum": {"beauty": 1}}, "there is no metric beauty"),
        ({"weights": {"beauty": "x"}}, "there is no metric beauty"),
        ({"minimum": {"psnr": float("nan")}}, "a finite number"),
        ({"metrics": ["fid"]}, "fid cannot be computed: it needs at least 2048 images"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "/nowhere.txt"}, "cannot be read"),
        ({"seed": -1}, "out of range"),
        ({"out": "/dev/null"}, "is a file"),
        ({"out": "/"}, "has other things in it"),
        ({"out": "/proc/nothing"}, "--out /proc/nothing cannot be made: No such file"),
        ({"num_images": 10**12}, "1000000000000 images of 32×32 on 2 paths take .* GiB of memory, .* --num-images"),
        ({"backend": "onnxruntime"}, "none of the paths is a bundle"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_a_sentence(
    pruned: dict[str, Path], options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "load", None)  # before anything is loaded
    with pytest.raises(InputError, match=words):
        evaluate([pruned["2:4"]], "fashion", **{**QUICK, **options})


def test_a_prompt_that_is_cut_brings_no_words_of_a_library(
    pruned: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate([pruned["2:4"]], "fashion", prompts=["a red bag " * 50], num_inference_steps=1, metrics=["psnr"])
    assert capfd.readouterr().err == ""


def test_paths_are_named_by_what_tells_them_apart(pruned: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        shutil.copytree(pruned["2:4"], tmp_path / name)
    subjects = look([tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y", "fashion"])
    assert [one.name for one in subjects] == ["a/x", "b/x", "y", "fashion"]
    with pytest.raises(InputError, match="given twice"):
        look([tmp_path / "b" / "y", tmp_path / "a" / ".." / "b" / "y"])


def test_prompts_begin_again_with_other_seeds(pruned: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red bag\na blue coat\n")
    options = {**QUICK, "num_images": 3, "num_inference_steps": 1, "seed": 7, "metrics": ["held_out_item_accuracy"]}
    result = evaluate([pruned["2:4"]], "fashion", prompts=file, **options)
    assert result["settings"]["prompts"] == ["a red bag", "a blue coat", "a red bag"]
    assert result["settings"]["seeds"] == [7, 8, 9]
    assert result["results"][0]["metrics"]["held_out_item_accuracy"]["images"] == 1
    with pytest.raises(InputError, match="no prompt says"):
        evaluate([pruned["2:4"]], "fashion", prompts=["a red bag"], **{**options, "num_images": 1})


@pytest.mark.parametrize("family", ["pixart", "dit", "flux", "unet", "wan"])
def test_every_family_can_be_drawn_with_its_latents(tiny_model: Any, family: str) -> None:
    """PixArt and DiT take no callbacks; DiT steps with both halves of its guidance; FLUX packs; Wan draws frames."""
    path = tiny_model(family)
    pipe = load(path, device="cpu")
    options = call_options(pipe, path, {"num_inference_steps": 2})
    (spec,) = (one.source.spec for one in look([path]))
    prompts = list(spec.prompts[:2]) if spec.prompts else ["a red bag", "a blue coat"]
    whole = quality.draw(pipe, prompts, [3, 4], options, batch_size=2)
    each = quality.draw(pipe, prompts, [3, 4], options, batch_size=1)
    assert len(whole.latents) == len(whole.images) == 2
    assert quality.latent_error(each, whole) < 1e-6
    assert quality.latent_error(quality.draw(pipe, prompts, [4, 3], options), whole) > 1e-3
    if family not in ("dit", "wan"):  # DiT knows no latents as output; those of a video lose their other frames
        assert whole.latents.equal(generate(pipe, prompts, [3, 4], options, "latent"))
