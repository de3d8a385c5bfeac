"""FLUX beside what every family is held to: variants with and without guidance, packed latents, half precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import flux, flux2
from torch import nn

from obsdiff.errors import InputError
from obsdiff.export.ranges import make_axes
from obsdiff.export.stage import export
from obsdiff.export.totals import default_axes
from obsdiff.files import read_json
from obsdiff.models import graph, walk
from obsdiff.models.source import Source, find_source, load_denoiser, meta_denoiser
from obsdiff.prune import memory
from obsdiff.prune.packages import cut
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import check_sides, load

VARIANTS: dict[str, Callable[[Path], Path]] = {
    "schnell": lambda folder: flux.make(folder, guidance=False),
    "klein": flux2.make_klein,
    "klein-distilled": lambda folder: flux2.make_klein(folder, distilled=True),
}
QUICK: dict[str, Any] = {
    "pattern": "structured",
    "num_prompts": 2,
    "steps": 2,
    "batch_size": 2,
    "packages": 1,
    "allocation": "uniform",
    "solver": "obs",
    "device": "cpu",
}


@pytest.fixture(scope="module", params=["flux", "flux2"])
def source(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Source:
    return find_source(tiny_model(request.param))


@pytest.fixture(scope="module")
def graphless(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flux") / source.spec.family
    export(source.path, out, formats=())
    return out


def draw(path: Path, **options: Any) -> torch.Tensor:
    pipe = load(path, "torch", "cpu")
    known = call_options(pipe, path, {"num_inference_steps": 2, **options})
    return torch.as_tensor(generate(pipe, ["a red bag", "a blue coat"], [3, 4], known, "latent"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_without_embedded_guidance(variant: str, tmp_path: Path) -> None:
    """Klein's calibration needs the negative embeddings, unless it is distilled."""
    torch.manual_seed(0)
    model, out, bundle = VARIANTS[variant](tmp_path / "model"), tmp_path / "out", tmp_path / "bundle"
    prune(model, out, **QUICK)
    manifest = export(out, bundle, formats=())
    assert "guidance" not in {entry.name for entry in manifest.inputs}
    wanted = draw(out)
    assert (draw(bundle) - wanted).norm() < 1e-4 * wanted.norm()
    assert torch.equal(draw(out, guidance_scale=1.0), wanted) == (variant != "klein")


def test_guidance_is_an_input_where_a_config_does_not_say(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """FLUX.2-dev was published before its config could say that it has guidance."""
    source = find_source(tiny_model("flux2"))
    config = {name: value for name, value in source.config.items() if name != "guidance_embeds"}
    assert [entry.name for entry in source.spec.graph_inputs(config)] == [entry.name for entry in source.spec.inputs]


def test_guidance_steers_the_picture(graphless: Path) -> None:
    one, other = draw(graphless, guidance_scale=1.0), draw(graphless, guidance_scale=7.0)
    assert (one - other).norm() > 1e-4 * one.norm()


def test_axes_of_packed_latents(source: Source) -> None:
    """32 pixels are 8 latents along a side, and 4 tokens, since 2 by 2 latents are packed."""
    axes = make_axes(source, "1:2:4", None)
    assert list(axes) == ["batch", "height", "width", "tokens", "image"]
    said = {name: (axis.min, axis.opt, axis.max, axis.multiple) for name, axis in axes.items()}
    assert said["batch"] == (1, 2, 4, 1)  # guidance takes no second picture in a call
    assert said["height"] == said["width"] == (4, 8, 12, 2)
    assert said["image"] == (4, 16, 36, 1)
    with pytest.raises(InputError, match="multiples of 8 pixels"):
        make_axes(source, "1:1:1", "12:16:32")


def test_default_axes_are_a_megapixel(source: Source) -> None:
    """Neither the config nor a folder from the hub says so: the pipelines do."""
    other = Source(source.name, source.path, source.index, source.spec, source.config, {})
    assert default_axes(other) == {"batch": 1, "height": 128, "width": 128, "tokens": 512}
    axes = graph.with_image(default_axes(other), source.spec, source.config)
    assert axes["image"] == 64 * 64


def test_macs_count_every_token(source: Source) -> None:
    axes = {"batch": 1, "height": 8, "width": 12, "tokens": 7}
    denoiser, macs = load_denoiser(source), 0
    seen: dict[str, int] = {}

    def keep(name: str, module: nn.Linear) -> None:
        module.register_forward_hook(lambda _m, _a, out: seen.__setitem__(name, out.numel() // module.out_features))

    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            keep(name, module)
    with torch.no_grad():
        graph.TensorDenoiser(denoiser, source.spec)(*graph.random_inputs(source.spec, source.config, axes).values())
    macs = sum(walk.linear(denoiser, name).weight.numel() * tokens for name, tokens in seen.items())
    tokens, width, blocks = 7 + 4 * 6, 32, 4
    assert set(seen.values()) == {1, 7, 24, 31}
    macs += blocks * 2 * tokens**2 * width
    assert graph.count_macs(meta_denoiser(source), source.spec, source.config, axes) == macs


def test_memory_of_a_calibration(source: Source) -> None:
    denoiser = meta_denoiser(source)
    recipe = make_recipe(source, {"device": "cpu", "solver": "obs", "pattern": "structured"})
    stages = walk.group_stages(denoiser, source.spec, "2:3")
    need = memory.predict(denoiser, source.spec, cut(stages, 1), recipe, 100)
    assert len(stages) == 2  # both read one linear, which has one Hessian
    assert need["hessians"] == 4 * walk.linear(denoiser, stages[0].linears[0][0]).in_features ** 2


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"height": 28}, "height 28 is outside .*: 16 to 48 pixels in steps of 8"),
        ({"width": 56}, "width 56 is outside"),
        ({"height": 30}, "height 30 is outside"),
    ],
)
def test_sizes_that_cannot_be_drawn(graphless: Path, sides: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sides(graphless, sides)
    check_sides(graphless, {"height": 16, "width": 48})


def test_sizes_that_can_be_drawn(graphless: Path, source: Source) -> None:
    """At the ends of the range, and not square: as many tokens come out as the torch model gives."""
    for height, width in ((16, 48), (48, 48), (40, 24)):
        wanted = draw(source.path, height=height, width=width)
        assert (draw(graphless, height=height, width=width) - wanted).norm() < 1e-4 * wanted.norm()
    with pytest.raises(InputError, match="image 49 is outside what the bundle was exported for: 4 to 36 image tokens"):
        draw(graphless, height=56, width=56)


def test_pictures_come_out_in_their_size(graphless: Path) -> None:
    pipe = load(graphless, "torch", "cpu")
    options = call_options(pipe, graphless, {"num_inference_steps": 1, "height": 16, "width": 40})
    (image,) = generate(pipe, ["a red bag"], [0], options)
    assert image.size == (40, 16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_embeds_the_exact_time(source: Source, dtype: torch.dtype) -> None:
    """The denoiser alone casts a timestep before it multiplies it by 1000, and embeds another one."""
    axes = {"batch": 8, "height": 8, "width": 8, "tokens": 7}
    inputs = graph.random_inputs(source.spec, source.config, axes)
    wanted = graph.TensorDenoiser(load_denoiser(source, torch.float32), source.spec)(*inputs.values())
    halves = graph.random_inputs(source.spec, source.config, axes, dtype)
    half = load_denoiser(source, dtype)
    got = graph.TensorDenoiser(half, source.spec)(*halves.values()).float()
    plain = half(**halves, return_dict=False)[0].float()
    tolerance = 0.01 if dtype == torch.float16 else 0.08
    assert (got - wanted).norm() < tolerance * wanted.norm()
    assert (plain - wanted).norm() > 4 * (got - wanted).norm()


def test_a_checkpoint_of_fused_projections_is_plain_diffusers(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing about the narrowed widths reaches the config: the folder loads at full shape."""
    model = tiny_model("flux2")
    prune(model, tmp_path / "out", **{**QUICK, "blocks": ":"})
    before, after = (read_json(path / "transformer" / "config.json") for path in (model, tmp_path / "out"))
    assert after.pop("sparsity_config")["sparsity_structure"] == "structured"
    assert after == before
