"""A denoiser without a spec (AuraFlow, tests/tiny/generic.py): exported as its pipeline calls it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.errors import InputError
from obsdiff.export import probe as probing
from obsdiff.export.bundle import read_manifest
from obsdiff.export.inspect import inspect
from obsdiff.export.probe import probe
from obsdiff.export.stage import export
from obsdiff.models import FAMILIES, find_spec, walk
from obsdiff.models.source import MANIFEST, find_source, load_denoiser
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

QUICK: dict[str, Any] = {"num_prompts": 4, "steps": 2, "batch_size": 2, "packages": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("generic")


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def dense_bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a graph: to read or copy."""
    bundle = tmp_path_factory.mktemp("generic") / "bundle"
    export(model, bundle, formats=())
    return bundle


def test_blocks_are_the_module_lists_and_norms_stay_dense(model: Path) -> None:
    source = find_source(model)
    denoiser = load_denoiser(source)
    stages = walk.linear_stages(denoiser, source.spec)
    assert [block.name for block in walk.blocks_of(denoiser, source.spec)] == [
        "joint_transformer_blocks.0",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]
    names = [name for stage in stages for shared in stage.linears for name in shared]
    every = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(len(stage.linears) == len(stage.linears[0]) == 1 for stage in stages)
    assert names == [name for name in every if "_blocks." in name and "norm" not in name]
    assert len(names) == 14 + 7 + 7


def latents(path: Path, backend: str, **options: Any) -> torch.Tensor:
    pipe = load(path, backend, "cpu")
    asked = call_options(pipe, path, {"num_inference_steps": 2, **options})
    return torch.as_tensor(generate(pipe, ["a red bag", "a blue coat"], [3, 4], asked, "latent"))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_it_is_pruned_exported_and_drawn(model: Path, tmp_path: Path, pattern: str) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    info = prune(model, checkpoint, pattern=pattern, **QUICK)
    assert len(info.layers) == 28
    assert all(layer.error is not None and layer.error < 1 for layer in info.layers)
    found = inspect(checkpoint)
    assert found["totals"]["nonzero"][1] < 0.9 * found["totals"]["nonzero"][0]
    formats = ("onnx",) if pattern == "2:4" else ()
    manifest = export(checkpoint, bundle, formats=formats)
    assert manifest.totals.macs > 0
    assert {entry.name: entry.axes for entry in manifest.inputs} == {
        "hidden_states": ("batch", 8, "height", "width"),
        "encoder_hidden_states": ("batch", "tokens", 32),
        "timestep": ("batch",),
    }
    wanted = latents(checkpoint, "torch")
    assert (wanted - latents(model, "torch")).norm() > 1e-4 * wanted.norm()
    for backend in ("torch", "onnxruntime") if formats else ("torch",):
        assert (latents(bundle, backend) - wanted).norm() < 1e-3 * wanted.norm(), backend
    other = {"height": 48, "width": 80, "max_sequence_length": 9, "guidance_scale": 1.0}
    wanted = latents(checkpoint, "torch", **other)
    assert (latents(bundle, "auto", **other) - wanted).norm() < 1e-3 * wanted.norm()


def test_heads_and_neurons_need_a_spec(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--pattern structured: .* AuraFlowTransformer2DModel make up a head"
    ) as caught:
        prune(model, tmp_path / "out", pattern="structured", **QUICK)
    assert all(name in str(caught.value) for name in FAMILIES)
    assert not list(tmp_path.iterdir())


def test_a_stream_needs_a_spec(model: Path, tmp_path: Path) -> None:
    options = {name: value for name, value in QUICK.items() if name != "packages"}
    with pytest.raises(InputError, match="do not form one chain; use sampler"):
        prune(model, tmp_path / "out", calibration="stream", **options)


@pytest.mark.parametrize("name", ["PixelMagic2DModel", "DiffusionPipeline", "__doc__", "not a name"])
def test_what_is_no_model_of_diffusers_is_of_no_known_family(name: str) -> None:
    with pytest.raises(InputError, match=r"does not know. It knows: "):
        find_spec(name, {"_class_name": name})


def test_a_model_without_blocks_is_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match=r"^the denoiser AutoencoderTiny is .* nothing can be pruned$") as caught:
        find_spec("AutoencoderTiny", {"in_channels": 3})
    assert "\n" not in str(caught.value)


def test_a_config_of_another_class_is_refused(copied: Path) -> None:
    edit(copied / "transformer" / "config.json", num_attention_heads="many")
    with pytest.raises(InputError, match=r"config\.json is not of a AuraFlowTransformer2DModel"):
        find_source(copied)


def test_what_a_graph_cannot_take_is_named_and_pruning_still_works(copied: Path, tmp_path: Path) -> None:
    edit(copied / "generation_config.json", attention_kwargs={"scale": 1.0})
    with pytest.raises(InputError, match=r"attention_kwargs is a dict where a graph takes tensors alone; .* pruned"):
        export(copied, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_pipeline_that_fails_says_so(copied: Path, tmp_path: Path) -> None:
    edit(copied / "generation_config.json", height=60)
    with pytest.raises(InputError, match=r"its pipeline does not show .* it fails at"):
        export(copied, tmp_path / "bundle")


PROBES = ("base", "batch", "height", "width", "tokens")


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((4, 8), (6, 8), (4, 8), (4, 8), (4, 8)), ("batch", 8)),
        (((4, 64, 3), (6, 64, 3), (4, 96, 3), (4, 96, 3), (4, 64, 3)), ("batch", "image", 3)),
        (((7, 4), (7, 4), (7, 4), (7, 4), (3, 4)), ("tokens", 4)),
        (((), (), (), (), ()), ("batch",)),
        (((71,), (71,), (103,), (103,), (67,)), "axis 0 of x .* moves with height and width and tokens"),
        (((4, 1), (6, 1), (4, 1), (4, 1), (4,)), "x does not always have 2 axes"),
    ],
)
def test_an_axis_is_what_it_moves_with(model: Path, shapes: Any, expected: Any) -> None:
    values = {name: torch.zeros(shape) for name, shape in zip(PROBES, shapes, strict=True)}
    source = find_source(model)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            probing._axes(source, "x", values)
    else:
        assert probing._axes(source, "x", values) == expected


def test_the_probe_finds_patch_prompt_and_passes(model: Path) -> None:
    spec = probe(find_source(model)).spec
    assert (spec.patch, spec.tokens, spec.passes) == (2, (1, 16, 256), 2)
    assert [(entry.name, entry.dtype, entry.draw) for entry in spec.inputs] == [
        ("hidden_states", None, None),
        ("encoder_hidden_states", None, None),
        ("timestep", "float32", 1),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": "StableDiffusion3Pipeline"}, "is no model of diffusers"),
        ({"denoiser": "os"}, "is no model of diffusers"),
        ({"component": "vae"}, "component"),
        ({"outputs": []}, "one output"),
        ({"inputs": [{"name": "x", "dtype": "float32", "axes": ["batch", "depth"]}]}, "'depth' is neither a size"),
        ({"inputs": [{"name": "x", "dtype": "float32", "axes": ["batch", 0]}]}, "0 is neither a size"),
        ({"inputs": [{"name": "x", "dtype": "float32", "axes": ["batch"]}]}, "has no input x"),
        ({"inputs": [{"name": "timestep", "dtype": "float32", "axes": ["batch"]}]}, "the axes must be"),
    ],
)
def test_a_manifest_that_does_not_fit_itself(
    dense_bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    bundle = shutil.copytree(dense_bundle, tmp_path / "bundle")
    edit(bundle / MANIFEST, **changes)
    with pytest.raises(InputError, match=message):
        read_manifest(bundle)
