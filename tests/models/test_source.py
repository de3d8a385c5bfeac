"""A MODEL argument: what is accepted, and for everything else one sentence before anything is loaded."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.errors import InputError
from obsdiff.files import folder_hash
from obsdiff.models import FAMILIES, find_spec
from obsdiff.models.source import (
    UNSAFE,
    find_source,
    load_denoiser,
    load_pipeline,
    meta_denoiser,
    quiet_libraries,
)

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_sd3: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(tiny_sd3, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry != "gone"}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_the_embedded_model_resolves_by_its_name() -> None:
    source = find_source("fashion")
    assert source.name == "fashion"
    assert source.spec is FAMILIES["SD3Transformer2DModel"]
    assert source.defaults["num_inference_steps"] == 20
    assert source.prompt_tokens == 12
    assert source.denoiser_path == source.path / "transformer"
    assert source.null_components.keys() >= {"text_encoder_3", "tokenizer_3"}
    config = json.loads((source.path / "vae" / "config.json").read_text())
    assert source.vae_scale == 2 ** (len(config["block_out_channels"]) - 1)


def test_a_folder_without_generation_defaults_falls_back_to_its_family(model: Path) -> None:
    (model / "generation_config.json").unlink()
    source = find_source(model)
    assert source.defaults == {}
    assert source.prompt_tokens == source.spec.tokens[1]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/else", "../some/where", "/no/where", "~/no", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_source(name)


def test_a_hub_id_that_cannot_be_reached_gives_one_sentence() -> None:
    with pytest.raises(InputError, match=r"nobody-here/no-such-model.* could not be fetched from the hub") as caught:
        find_source("nobody-here/no-such-model-of-obsdiff")
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_one_gives_one_sentence() -> None:
    with pytest.raises(InputError, match="could not be fetched from the hub"):
        find_source("some owner/some model")


def test_a_file_instead_of_a_folder(model: Path) -> None:
    with pytest.raises(InputError, match=r"is a file: a diffusers pipeline is a folder with a model_index\.json"):
        find_source(model / WEIGHTS)


def test_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"it has no model_index\.json"):
        find_source(tmp_path)


def test_a_bundle_where_a_model_is_needed(graphless: Path) -> None:
    with pytest.raises(InputError, match=r"is a bundle.*a diffusers pipeline is needed"):
        find_source(graphless)


@pytest.mark.parametrize("text", ["[]", "null", '"StableDiffusion3Pipeline"', "{}", '{"_class_name": 3}'])
def test_an_index_that_names_no_pipeline(model: Path, text: str) -> None:
    (model / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=r"model_index\.json names no pipeline class"):
        find_source(model)


def test_a_truncated_index(model: Path) -> None:
    cut(model / "model_index.json", 40)
    with pytest.raises(InputError, match=r"model_index\.json cannot be read as JSON"):
        find_source(model)


@pytest.mark.parametrize("component", ["transformer", "unet"])
def test_an_unknown_family_is_told_which_ones_are_known(model: Path, component: str) -> None:
    edit(model / "model_index.json", transformer="gone")
    edit(model / "model_index.json", **{component: ["diffusers", "PixelMagic2DModel"]})
    with pytest.raises(InputError, match="PixelMagic2DModel") as caught:
        find_source(model)
    for name, spec in FAMILIES.items():
        assert name in str(caught.value)
        assert spec.title in str(caught.value)


def test_find_spec_knows_what_is_registered() -> None:
    for name, spec in FAMILIES.items():
        assert find_spec(name) is spec
        assert spec.denoiser == name
    with pytest.raises(InputError, match="does not know"):
        find_spec("")


@pytest.mark.parametrize("entry", ["gone", [None, None], "transformer", {}])
def test_a_pipeline_without_a_denoiser(model: Path, entry: Any) -> None:
    edit(model / "model_index.json", transformer=entry)
    with pytest.raises(InputError, match="neither a transformer nor a unet"):
        find_source(model)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2", "scheduler", "tokenizer"])
def test_a_missing_component_folder(model: Path, component: str) -> None:
    shutil.rmtree(model / component)
    with pytest.raises(InputError, match=rf"{component}.* is missing"):
        find_source(model)


def test_a_missing_denoiser_config(model: Path) -> None:
    (model / "transformer" / "config.json").unlink()
    with pytest.raises(InputError, match=r"transformer/config\.json is missing"):
        find_source(model)


@pytest.mark.parametrize("text", ["[]", "null", '"config"', "3"])
@pytest.mark.parametrize("name", ["transformer/config.json", "generation_config.json"])
def test_a_config_that_is_no_object(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    with pytest.raises(InputError, match=name):
        find_source(model)


@pytest.mark.parametrize("suffix", UNSAFE)
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_pickle_where_safetensors_is_expected_is_refused(model: Path, suffix: str, component: str) -> None:
    (weights,) = (model / component).glob("*.safetensors")
    weights.rename(weights.with_suffix(suffix))
    before = folder_hash(model)
    with pytest.raises(InputError, match=rf"{component}.*\{suffix} is a pickle, which can run code.*safetensors"):
        find_source(model)
    assert folder_hash(model) == before


def test_a_pickle_beside_safetensors_is_never_opened(model: Path) -> None:
    trap = b"cos\nsystem\n(S'touch opened'\ntR."
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(trap)
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(trap)
    load_pipeline(find_source(model))
    assert not Path("opened").exists()


def test_a_denoiser_without_any_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"holds no \.safetensors weights"):
        find_source(model)


@pytest.mark.parametrize("size", [0, 7, 100, 50_000])
def test_truncated_weights(model: Path, size: int) -> None:
    cut(model / WEIGHTS, size)
    with pytest.raises(InputError, match=rf"{WEIGHTS} is truncated or is not safetensors: .") as caught:
        find_source(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["NoSuchPipeline", "StableDiffusion3InpaintPipeline"])
def test_another_pipeline_of_the_family_is_refused(model: Path, name: str) -> None:
    edit(model / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=rf"is a {name}: of its family obsdiff takes StableDiffusion3Pipeline"):
        find_source(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "vae/diffusion_pytorch_model.safetensors", 1000),
        lambda folder: cut(folder / "text_encoder/model.safetensors", 1000),
        lambda folder: cut(folder / "tokenizer/tokenizer.json", 1000),
        lambda folder: cut(folder / "scheduler/scheduler_config.json", 10),
        lambda folder: edit(folder / "model_index.json", vae=["diffusers", "NoSuchAutoencoder"]),
        lambda folder: edit(folder / "transformer/config.json", num_layers=7),
    ],
    ids=["vae", "encoder", "tokenizer", "scheduler", "class", "config"],
)
def test_a_damaged_component_is_one_sentence(model: Path, damage: Callable[[Path], None]) -> None:
    damage(model)
    with pytest.raises(InputError, match=r"model cannot be loaded: .|model\.safetensors is truncated") as caught:
        load_pipeline(find_source(model))
    assert "\n" not in str(caught.value)


def test_null_components_stay_null(tiny_sd3: Path) -> None:
    pipe: Any = load_pipeline(find_source(tiny_sd3))
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    assert pipe.text_encoder is not None


def test_an_index_that_leaves_optional_components_out_loads(model: Path) -> None:
    edit(model / "model_index.json", feature_extractor="gone", image_encoder="gone")
    pipe: Any = load_pipeline(find_source(model))
    assert pipe.image_encoder is None


def test_components_can_be_handed_in_and_the_dtype_chosen(tiny_sd3: Path) -> None:
    source = find_source(tiny_sd3)
    denoiser = load_denoiser(source, torch.bfloat16)
    assert not denoiser.training
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    pipe: Any = load_pipeline(source, torch.bfloat16, transformer=denoiser)
    assert pipe.transformer is denoiser
    assert pipe.vae.dtype == torch.bfloat16


def test_the_denoiser_on_the_meta_device_has_the_same_shapes(tiny_sd3: Path) -> None:
    source = find_source(tiny_sd3)
    meta = meta_denoiser(source)
    assert all(value.is_meta for value in meta.parameters())
    wanted = {name: value.shape for name, value in load_denoiser(source).named_parameters()}
    assert {name: value.shape for name, value in meta.named_parameters()} == wanted


def test_the_libraries_speak_again_afterwards() -> None:
    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    before = [logger.level for logger in loggers]

    def fail() -> None:
        with quiet_libraries():
            assert [logger.level for logger in loggers] == [logging.ERROR] * 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [logger.level for logger in loggers] == before
