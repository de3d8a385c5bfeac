"""The metrics, each against another implementation or a picture of which the answer is known."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from obsdiff.errors import InputError
from obsdiff.measure import fashion
from obsdiff.measure.metrics import METRICS, Missing, alone, distributions, paired
from obsdiff.measure.quality import Drawn, as_tensor, latent_error
from obsdiff.models.source import EMBEDDED


def drawn(count: int = 3, side: int = 40, seed: int = 0) -> Drawn:
    """Smooth random pictures and latents."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in small]
    return Drawn(images, torch.from_numpy(draw.normal(size=(count, 4, 5, 5))).float())


ONE, OTHER = drawn(), drawn(seed=1)


@pytest.mark.parametrize(
    ("name", "same"), [("latent_mse", 0.0), ("latent_error", 0.0), ("psnr", paired.SAME), ("ssim", 1.0)]
)
def test_a_picture_is_nearest_to_itself(name: str, same: float) -> None:
    score = METRICS[name].open(None, "cpu")
    assert score(ONE, ONE).tolist() == pytest.approx([same] * 3)
    apart = score(ONE, OTHER)
    assert apart.shape == (3,)
    assert ((apart > same) if METRICS[name].better == "lower" else (apart < same)).all()


def test_the_paired_metrics_agree_with_scikit_image_picture_by_picture() -> None:
    measure = pytest.importorskip("skimage.metrics")
    ours, theirs = paired.psnr(None, "cpu")(ONE, OTHER), paired.ssim(None, "cpu")(ONE, OTHER)
    for k in range(3):
        a, b = np.asarray(OTHER.images[k]), np.asarray(ONE.images[k])
        assert ours[k] == pytest.approx(measure.peak_signal_noise_ratio(a, b), rel=1e-4)
        options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, everywhere = measure.structural_similarity(a, b, full=True, **options)  # its mean leaves out the border
        assert theirs[k] == pytest.approx(everywhere.mean(), abs=5e-3)


def test_the_latent_metrics_are_means_of_squared_differences() -> None:
    mse = paired.latent_mse(None, "cpu")(ONE, OTHER)
    assert mse.mean() == pytest.approx((ONE.latents - OTHER.latents).square().mean().item())
    assert paired.latent_error(None, "cpu")(ONE, OTHER).mean() == pytest.approx(latent_error(ONE, OTHER))


def test_pictures_too_small_for_a_window_are_told() -> None:
    with pytest.raises(Missing, match="at least 11 pixels"):
        paired.ssim(None, "cpu")(drawn(side=8), drawn(side=8))


def alexnet() -> nn.Sequential:
    """The layers of torchvision's AlexNet.features, by their numbers."""
    sizes = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1)}
    sizes[10] = (256, 256, 3, 1, 1)
    pools = (2, 5, 12)
    return nn.Sequential(
        *(nn.Conv2d(*sizes[k]) if k in sizes else nn.MaxPool2d(3, 2) if k in pools else nn.ReLU() for k in range(13))
    )


def test_lpips_reads_alexnet_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision may be absent: its network is made here; linear layers and the rest are torchmetrics' own."""
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", lambda net, pretrained: alexnet())
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    path = tmp_path / paired.ALEXNET
    torch.save({f"features.{name}": value for name, value in alexnet().state_dict().items()}, path)
    score = paired.lpips(tmp_path, "cpu")
    assert score(ONE, ONE).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (score(ONE, OTHER) > 0).all()
    assert torch.equal(paired.lpips(path, "cpu")(ONE, OTHER), score(ONE, OTHER))
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(Missing, match=r"it has no features\.0\.bias"):
        paired.lpips(path, "cpu")(ONE, OTHER)


def test_accuracy_is_what_the_classifier_sees() -> None:
    prompts = ["a red bag", "something blue", "a green bag", "nothing"]
    pictures = drawn(4, 32)
    for held_out in (False, True):
        values = [alone.accuracy(which, held_out)(None, "cpu")(pictures, prompts) for which in (0, 1)]
        named = [fashion.parse_caption(prompt) for prompt in prompts]
        for which in (0, 1):
            counted = [
                held_out <= fashion.held_out(p) and n[which] is not None for p, n in zip(prompts, named, strict=True)
            ]
            assert (~values[which].isnan()).tolist() == counted
    whole = fashion.accuracy(as_tensor(pictures.images), prompts)
    for name in ("item_accuracy", "colour_accuracy"):
        assert METRICS[name].open(None, "cpu")(pictures, prompts).nanmean() == pytest.approx(whole[name])


class Brightness(nn.Module):
    """Four features of uint8 pictures, in the place of Inception."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.float().mean((2, 3)) / 255
        return torch.cat([means, images.float().std((1, 2, 3))[:, None] / 255], 1)


def pixels(pictures: Drawn) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in pictures.images])).permute(0, 3, 1, 2)


def test_the_distances_are_torchmetrics_own() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = drawn(40, 20), drawn(40, 20, seed=5)
    a, b = Brightness()(pixels(real)), Brightness()(pixels(fake))
    theirs: Callable[..., Any] = FrechetInceptionDistance(feature=Brightness())
    kernel: Callable[..., Any] = KernelInceptionDistance(feature=Brightness(), subsets=1, subset_size=40)
    for metric in (theirs, kernel):
        metric.update(pixels(real), real=True)  # type: ignore[attr-defined]
        metric.update(pixels(fake), real=False)  # type: ignore[attr-defined]
    assert fashion.frechet_distance(b, a) == pytest.approx(theirs.compute().item(), rel=1e-3)  # type: ignore[attr-defined]
    assert distributions.kernel_distance(a, b) == pytest.approx(kernel.compute()[0].item(), rel=1e-3, abs=1e-6)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with the embedded model's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    torch.manual_seed(0)
    tokenizer = CLIPTokenizerFast.from_pretrained(EMBEDDED["fashion"] / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip") / "model"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**crop), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_picture_and_prompt_whatever_the_batch(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    prompts = ["a red bag", "teal trousers", "a red bag " * 20]  # the last is longer than the model reads
    scores = alone.clip_score(clip, "cpu")(ONE, prompts)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for k in range(3):
        words = processor(text=prompts[k], images=ONE.images[k], return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            output = model(**words)
        cosine = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).item()
        assert scores[k] == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)


def test_weights_that_are_pickles_or_are_not_there_are_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        alone.clip_score(tmp_path, "cpu")
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Missing, match="pickles are refused"):
        alone.clip_score(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("name", "module", "package", "file"),
    [
        ("lpips", "torchvision", "torchvision", paired.ALEXNET),
        ("fid", "torch_fidelity", "torch-fidelity", distributions.INCEPTION),
        ("kid", "torch_fidelity", "torch-fidelity", distributions.INCEPTION),
        ("hpsv2", "open_clip", "open_clip_torch", alone.HPS_FILE),
        ("image_reward", "ImageReward", "image-reward", alone.REWARD_FILE),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(
    name: str, module: str, package: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *named: None)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(Missing, match=file) as told:
        METRICS[name].open(None, "cpu")
    assert "https://" in str(told.value) or "hf download" in str(told.value)
    with pytest.raises(InputError, match="is not there"):
        METRICS[name].open(tmp_path / "nowhere", "cpu")
    monkeypatch.delitem(sys.modules, module)
    if module not in sys.modules and not _found(module):
        with pytest.raises(Missing, match=f"pip install {package}"):
            METRICS[name].open(None, "cpu")


def _found(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
