"""A bundle as a diffusers pipeline: what worked with the dense one goes on working."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

import obsdiff
from obsdiff.errors import InputError
from obsdiff.export.bundle import open_bundle
from obsdiff.export.stage import export
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import check_sides, load

PROMPTS = ["a photo of a red ankle boot", "teal trousers", "a yellow dress"]
SEEDS = [3, 1, 2]
DIFFUSERS: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 0}


@pytest.fixture(scope="module")
def pipes(bundles: dict[str, Path], pruned: dict[str, Path]) -> dict[str, Any]:
    return {
        "source": load(pruned["structured"]),
        "torch": load(bundles["structured"], backend="torch"),
        "onnxruntime": load(bundles["structured"], backend="onnxruntime"),
    }


def draw(pipe: Any, steps: int = 6, output_type: str = "pt", **options: Any) -> torch.Tensor:
    return generate(pipe, PROMPTS, SEEDS, {**DIFFUSERS, "num_inference_steps": steps, **options}, output_type)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_backends_draw_what_the_checkpoint_draws(pipes: dict[str, Any], output_type: str) -> None:
    drawn = {name: draw(pipe, output_type=output_type) for name, pipe in pipes.items()}
    assert drawn["source"].std() > 0.1
    for name in ("torch", "onnxruntime"):
        torch.testing.assert_close(drawn[name], drawn["source"], rtol=1e-3, atol=1e-3)


def test_a_dense_bundle_draws_what_plain_diffusers_draws(bundles: dict[str, Path]) -> None:
    from obsdiff.models.source import DATA

    plain = StableDiffusion3Pipeline.from_pretrained(
        DATA / "fashion", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    plain.set_progress_bar_config(disable=True)
    pipe = obsdiff.load(bundles["dense"])
    assert type(pipe) is StableDiffusion3Pipeline
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_callbacks_see_and_change_every_step(pipes: dict[str, Any], backend: str) -> None:
    seen: list[int] = []

    def callback(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        if step == 2:
            pipe._interrupt = True
        return {"latents": tensors["latents"] * 0}

    latents = draw(pipes[backend], output_type="latent", callback_on_step_end=callback)
    assert seen == [0, 1, 2]
    assert not latents.any()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_schedulers_can_be_replaced(pipes: dict[str, Any], backend: str) -> None:
    pipe, source = pipes[backend], pipes["source"]
    before = draw(pipe, output_type="latent")
    kept = [pipe.scheduler, source.scheduler]
    try:
        for scheduler, changes in (
            (FlowMatchHeunDiscreteScheduler, {}),
            (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        ):
            for each in (pipe, source):
                each.scheduler = scheduler.from_config(each.scheduler.config, **changes)
            after = draw(pipe, output_type="latent")
            assert (after - before).abs().max() > 0.05
            torch.testing.assert_close(after, draw(source, output_type="latent"), rtol=1e-3, atol=1e-3)
    finally:
        pipe.scheduler, source.scheduler = kept


@pytest.mark.parametrize("size", [(16, 48), (40, 24)])
def test_sizes_in_range_are_drawn(pipes: dict[str, Any], size: tuple[int, int]) -> None:
    options = {"height": size[0], "width": size[1]}
    images = draw(pipes["onnxruntime"], **options)
    assert images.shape == (3, 3, *size)
    torch.testing.assert_close(images, draw(pipes["source"], **options), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize(
    ("options", "count", "pattern"),
    [
        ({"height": 56}, 1, r"height 56 is outside .*: 16 to 48 pixels in steps of 8"),
        ({"width": 8}, 1, r"width 8 is outside .*: 16 to 48 pixels in steps of 8"),
        ({}, 9, r"batch 18 is outside .*: 1 to 16 denoiser inputs \(two an image with guidance\)"),
        ({"height": 20}, 1, r"height.* divisible by 8"),
    ],
)
def test_what_is_out_of_range_says_the_range(
    pipes: dict[str, Any], backend: str, options: dict[str, Any], count: int, pattern: str
) -> None:
    with pytest.raises(InputError, match=pattern):
        generate(pipes[backend], PROMPTS[:1] * count, range(count), {**DIFFUSERS, "num_inference_steps": 1, **options})


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_prompt_that_is_too_long_says_the_range(pipes: dict[str, Any], backend: str) -> None:
    embeds, pooled = torch.zeros(1, 590, 128), torch.zeros(1, 128)
    prompt = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    prompt |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    with pytest.raises(InputError, match=r"tokens 590 is outside .*: 1 to 589 prompt tokens"):
        pipes[backend](**DIFFUSERS, **prompt, num_inference_steps=1)


def test_the_denoiser_can_be_called_as_the_diffusers_one(pipes: dict[str, Any]) -> None:
    transformer = pipes["onnxruntime"].transformer
    inputs = {
        "hidden_states": torch.randn(1, 8, 8, 8),
        "encoder_hidden_states": torch.randn(1, 12, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([500]),
    }
    sample = transformer(**inputs).sample
    assert torch.equal(transformer(**inputs, return_dict=False)[0], sample)
    assert torch.equal(transformer(**inputs, joint_attention_kwargs=None).sample, sample)
    assert (transformer.device.type, transformer.dtype) == ("cpu", torch.float32)
    with pytest.raises(InputError, match=r"the engine has no input skip_layers: use the diffusers pipeline"):
        transformer(**inputs, skip_layers=[1])
    with pytest.raises(InputError, match=r"the engine needs the input timestep"):
        transformer(**{**inputs, "timestep": None})
    with pytest.raises(InputError, match=r"hidden_states has shape \[1, 4, 8, 8\]: 4 should be 8"):
        transformer(**{**inputs, "hidden_states": torch.randn(1, 4, 8, 8)})
    assert torch.equal(transformer(**{**inputs, "timestep": torch.tensor(500)}).sample, sample)
    named = [inputs.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
    assert torch.equal(transformer(*named, **inputs).sample, sample)
    inputs |= {"hidden_states": named[0], "encoder_hidden_states": named[1]}
    with pytest.raises(InputError, match=r"timestep has 2 axes, the engine wants 1"):
        transformer(**{**inputs, "timestep": torch.tensor([[500]])})
    with pytest.raises(InputError, match=r"timestep has shape \[2\]: its batch should be 1"):
        transformer(**{**inputs, "timestep": torch.tensor([500.0, 500.0])})


def test_the_pipeline_says_which_backend_it_runs_on(bundles: dict[str, Path], graphless: Path) -> None:
    assert load(bundles["dense"]).obsdiff_backend == "onnxruntime"
    assert load(bundles["dense"], backend="torch").obsdiff_backend == "torch"
    assert load(graphless).obsdiff_backend == "torch"


def test_a_manifest_that_was_verified_is_not_verified_again(graphless: Path) -> None:
    manifest = open_bundle(graphless)
    pipe = load(graphless, manifest=manifest.model_copy(update={"files": {}}))
    assert pipe.transformer.config["num_layers"] == 1


def test_a_bundle_in_half_precision_draws_in_float32_on_a_processor(one_block_sd3: Path, tmp_path: Path) -> None:
    export(one_block_sd3, tmp_path / "half", precision="fp16", formats=())
    pipe = load(tmp_path / "half")
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32}
    half, full = (draw(each, steps=2, output_type="latent") for each in (pipe, load(one_block_sd3)))
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("onnxruntime", "is not a bundle, so it runs on the torch backend: export it first"),
        ("openvino", "--backend openvino: there are auto, torch"),
    ],
)
def test_only_bundles_run_on_other_backends(one_block_sd3: Path, backend: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(one_block_sd3, backend=backend)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing does not exist"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", " "])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_device_that_is_not_there_is_one_sentence(
    graphless: Path, one_block_sd3: Path, device: str, backend: str
) -> None:
    for path in (graphless, one_block_sd3):
        with pytest.raises(InputError, match=f"--device {device}: torch cannot use it here: .+") as caught:
            load(path, backend=backend, device=device)
        assert len(str(caught.value).splitlines()) == 1


def test_options_come_from_the_folder_and_then_from_the_caller(pipes: dict[str, Any], bundles: dict[str, Path]) -> None:
    pipe, path = pipes["torch"], bundles["structured"]
    options = call_options(pipe, path)
    assert options == {**DIFFUSERS, "num_inference_steps": 20}
    assert call_options(pipe, "fashion") == options
    assert call_options(pipe, path, {"height": 16, "width": None, "no_such": 1}) == {**options, "height": 16}


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"height": 56}, r"^height 56 is outside .*: 16 to 48 pixels in steps of 8$"),
        ({"width": 8, "height": 32}, r"^width 8 is outside .*: 16 to 48 pixels in steps of 8$"),
        ({"height": 20}, r"^height 20 is outside .*: 16 to 48 pixels in steps of 8$"),
        ({"height": 33}, r"^height 33 is outside .*: 16 to 48 pixels in steps of 8$"),
    ],
    ids=str,
)
def test_sides_are_checked_before_anything_is_loaded(graphless: Path, sides: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sides(graphless, sides)
    check_sides(graphless, {"height": 48, "width": None, "guidance_scale": 1.0})
    check_sides("fashion", sides)
