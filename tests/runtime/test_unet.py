"""U-Nets as engines: what their pipelines hand over besides latents and a prompt, and the sizes that they can draw."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from obsdiff.errors import InputError
from obsdiff.export.stage import export
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundles(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Without a graph: they run on the torch backend, behind the same denoiser as every engine."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("unet", "sdxl"):
        export(tiny_model(name), folder / name, formats=())
    return {name: folder / name for name in ("unet", "sdxl")}


def latents(path: Path, **overrides: Any) -> torch.Tensor:
    pipe = load(path, "torch", "cpu")
    options = call_options(pipe, path, {"num_inference_steps": 2, **overrides})
    return torch.as_tensor(generate(pipe, ["a red bag", "a blue coat"], [3, 4], options, "latent"))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() < 1e-4 * other.norm())


@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_a_negative_prompt_reaches_the_engine(name: str, tiny_model: Make, bundles: dict[str, Path]) -> None:
    wanted = latents(tiny_model(name), negative_prompt="a shoe")
    assert close(latents(bundles[name], negative_prompt="a shoe"), wanted)
    assert not close(latents(bundles[name]), wanted)


def test_sizes_and_crops_reach_the_engine(tiny_model: Make, bundles: dict[str, Path]) -> None:
    options = {"original_size": (900, 700), "crops_coords_top_left": (120, 8)}
    wanted = latents(tiny_model("sdxl"), **options)
    assert close(latents(bundles["sdxl"], **options), wanted)
    assert not close(latents(bundles["sdxl"]), wanted)


def test_a_size_that_the_levels_do_not_halve_evenly_is_refused(tiny_model: Make, bundles: dict[str, Path]) -> None:
    assert latents(tiny_model("unet"), height=40).shape[2] == 10, "diffusers itself draws it, rounding the sides"
    with pytest.raises(InputError, match=r"height 40 is outside what the bundle was exported for: 16 to 48 .* of 16"):
        latents(bundles["unet"], height=40)


def test_a_consistency_model_is_told_the_guidance(tiny_model: Make, tmp_path: Path) -> None:
    """LCM embeds the guidance scale where other models take a second, empty prompt."""
    source = find_source(tiny_model("unet"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**source.config, "time_cond_proj_dim": 8})
    pipe: Any = load_pipeline(source, torch.float32, unet=unet)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "lcm")
    shutil.copy(source.path / "generation_config.json", tmp_path / "lcm")
    export(tmp_path / "lcm", tmp_path / "bundle", formats=())
    names = [entry["name"] for entry in json.loads((tmp_path / "bundle" / "manifest.json").read_text())["inputs"]]
    assert names == ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    wanted = latents(tmp_path / "lcm", guidance_scale=8.0)
    assert close(latents(tmp_path / "bundle", guidance_scale=8.0), wanted)
    assert not close(latents(tmp_path / "bundle", guidance_scale=1.5), wanted)
