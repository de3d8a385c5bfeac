"""Graphs of decoders and text encoders: what each family's pipeline passes and reads, and no graph that disagrees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import assert_sentence, call
from safetensors.torch import load_file, save_file

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import components, onnx
from obsdiff.export.bundle import open_bundle
from obsdiff.export.components import Plan, choose
from obsdiff.export.inspect import inspect
from obsdiff.export.ranges import make_axes
from obsdiff.export.recorded import record
from obsdiff.export.schema import component_graph
from obsdiff.export.stage import export
from obsdiff.models.source import find_source, load_pipeline

ALL = ("denoiser", "vae", "text_encoders")


def plan(model: Path, names: list[str]) -> dict[str, Plan]:
    """The plans of these components, without a graph."""
    source = find_source(model)
    axes = make_axes(source, "1:1:8", None)
    pipe: Any = load_pipeline(source, torch.float32)
    calls = record(pipe, source, names, axes)
    return {
        name: components._plan_decoder(source, pipe.vae, calls[name][0][0], axes)
        if name == "vae"
        else components._plan_encoder(source, pipe, name, calls[name], axes)
        for name in names
    }


def test_components_are_chosen_by_kind_and_named_as_the_pipeline_names_them(
    one_block_sd3: Path, tiny_model: Callable[[str], Path]
) -> None:
    sd3, dit = find_source(one_block_sd3), find_source(tiny_model("dit"))
    assert choose(sd3, ["denoiser"]) == []
    assert choose(sd3, ["text_encoders", "vae", "vae"]) == ["vae", "text_encoder", "text_encoder_2"]
    assert choose(dit, ["denoiser", "vae"]) == ["vae"]


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ("unet", "--components unet: there are denoiser, vae, text_encoders"),
        ("text_encoders", "a DiTPipeline has none"),
    ],
)
def test_what_the_pipeline_has_not_is_refused_before_anything_is_written(
    tiny_model: Callable[[str], Path], tmp_path: Path, wanted: str, pattern: str
) -> None:
    with pytest.raises(InputError, match=pattern):
        export(tiny_model("dit"), tmp_path / "bundle", components=["denoiser", wanted])
    assert not list(tmp_path.iterdir())


def test_a_bundle_says_what_its_graphs_take_and_give(graphed: Path) -> None:
    manifest = open_bundle(graphed)
    assert list(manifest.graphs) == ["vae", "text_encoder", "text_encoder_2"]
    vae, encoder = manifest.graphs["vae"], manifest.graphs["text_encoder"]
    assert [entry.axes for entry in (*vae.inputs, *vae.outputs)] == [
        ("batch", 8, "height", "width"),
        ("batch", 3, "height", "width"),
    ]
    assert vae.scale == 4
    assert {entry.name: entry.axes for entry in encoder.outputs} == {
        "output.0": ("batch", 64),
        "output.hidden_states.-2": ("batch", 12, 64),
    }
    for name, graph in manifest.graphs.items():
        assert component_graph(name) in manifest.files
        assert graph.check.relative_error <= graph.check.tolerance == 1e-4
        assert {shape["batch"] for shape in graph.check.shapes} == {1, 3}
        assert all(
            shape.get("height", 0) != graph.axes.get("height", graph.axes["batch"]).opt for shape in graph.check.shapes
        )


def test_inspect_shows_the_graphs(graphed: Path) -> None:
    about = inspect(graphed)["about"]
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert float(about[f"{name} (onnx) against PyTorch"]) <= 1e-4


def test_the_command_takes_names_with_commas(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    result = call("export", tiny_model("dit"), tmp_path / "bundle", "--components", "denoiser, vae,text_encoders")
    assert_sentence(result, 2, "--components text_encoders: a DiTPipeline has none")


@pytest.mark.parametrize(
    ("family", "name", "inputs", "outputs", "constants"),
    [
        ("unet", "text_encoder", {"input_ids": ("batch", 12)}, {"output.0": ("batch", 12, 64)}, {}),
        (
            "sdxl",
            "text_encoder_2",
            {"input_ids": ("batch", 12)},
            {"output.0": ("batch", 64), "output.hidden_states.-2": ("batch", 12, 64)},
            {"output_hidden_states": True},
        ),
        (
            "flux",
            "text_encoder",
            {"input_ids": ("batch", 12)},
            {"output.pooler_output": ("batch", 32)},
            {"output_hidden_states": False},
        ),
        (
            "flux",
            "text_encoder_2",
            {"input_ids": ("batch", "tokens")},
            {"output.0": ("batch", "tokens", 32)},
            {"output_hidden_states": False},
        ),
        (
            "pixart",
            "text_encoder",
            {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens")},
            {"output.0": ("batch", "tokens", 32)},
            {},
        ),
        (
            "qwenimage",
            "text_encoder",
            {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens")},
            {"output.hidden_states.-1": ("batch", "tokens", 32)},
            {"output_hidden_states": True},
        ),
        (
            "wan",
            "text_encoder",
            {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "tokens")},
            {"output.last_hidden_state": ("batch", "tokens", 32)},
            {},
        ),
    ],
)
def test_a_text_encoder_is_seen_at_work(
    tiny_model: Callable[[str], Path],
    family: str,
    name: str,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    found = plan(tiny_model(family), [name])[name]
    assert {entry.name: entry.axes for entry in found.spec.inputs} == inputs
    assert dict(zip(found.module.outputs, found.outputs, strict=True)) == outputs
    assert found.constants == constants


@pytest.mark.parametrize(
    ("family", "channels", "scale"), [("qwenimage", (4, 1), 8), ("sana", (8,), 32), ("flux", (8,), 4), ("dit", (8,), 4)]
)
def test_a_decoder_is_seen_at_work(
    tiny_model: Callable[[str], Path], family: str, channels: tuple[int, ...], scale: int
) -> None:
    found = plan(tiny_model(family), ["vae"])["vae"]
    assert found.spec.inputs[0].axes == ("batch", *channels, "height", "width")
    assert found.scale == scale
    assert found.axes["height"].min == 2, "previews are small"


def test_a_pipeline_that_reads_in_other_ways_is_refused(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    pipe: Any = load_pipeline(source, torch.float32)
    axes = make_axes(source, "1:1:8", None)
    calls = record(pipe, source, ["text_encoder"], axes)["text_encoder"]
    calls[0][0].arguments["output_hidden_states"] = False
    with pytest.raises(InputError, match="text_encoder is not always called with the same arguments"):
        components._plan_encoder(source, pipe, "text_encoder", calls, axes)
    pipe.encode_prompt = lambda *_, **__: pipe.text_encoder.text_model(torch.zeros(1, 12, dtype=torch.int64))[9]
    with pytest.raises(InputError, match="does not draw as it is"):
        record(pipe, source, ["text_encoder"], axes)


def test_a_decoder_that_overflows_stays_in_float32(one_block_sd3: Path) -> None:
    pipe: Any = load_pipeline(find_source(one_block_sd3), torch.float32)
    assert pipe.vae.config.force_upcast
    assert components._own_precision(pipe.vae, "fp16") == "fp32"
    assert components._own_precision(pipe.vae, "bf16") == "bf16"
    assert components._own_precision(pipe.text_encoder, "fp16") == "fp16"


def test_t5_keeps_in_float32_what_overflows(tiny_model: Callable[[str], Path]) -> None:
    pipe: Any = load_pipeline(find_source(tiny_model("flux")), torch.float32)
    components.cast_module(pipe.text_encoder_2, torch.float16)
    dtypes = {name: value.dtype for name, value in pipe.text_encoder_2.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept
    assert all(".wo." in name for name in kept)


def test_a_graph_that_disagrees_makes_no_bundle(
    graphed: Path, one_block_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(one_block_sd3, tmp_path / "model"))
    (path,) = (model / "vae").glob("*.safetensors")
    weights = load_file(path)
    weights["decoder.conv_out.weight"] *= 1.01
    save_file(weights, path, metadata={"format": "pt"})

    def other(_module: Any, name: str, _outputs: Any, *rest: Any) -> list[str]:
        shutil.copy(graphed / component_graph(name.removeprefix("the ")), rest[-1])
        return ["float32"]

    monkeypatch.setattr(onnx, "write_graph", other)
    with pytest.raises(ObsdiffError, match=r"graph of vae \(sample\) disagrees with PyTorch"):
        export(model, tmp_path / "bundle", formats=(), components=ALL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda value: value["graphs"].update(clock=value["graphs"]["vae"]), "'clock' has a graph and is no component"),
        (lambda value: value["graphs"]["vae"]["axes"].pop("height"), "the axes are not those of the inputs"),
        (lambda value: value["files"].pop("vae/model.onnx"), "does not list vae/model.onnx"),
    ],
)
def test_a_manifest_whose_graphs_do_not_fit_is_refused(
    graphed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], pattern: str
) -> None:
    bundle = Path(shutil.copytree(graphed, tmp_path / "bundle"))
    value = json.loads((bundle / "manifest.json").read_text())
    change(value)
    (bundle / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=pattern):
        open_bundle(bundle)
