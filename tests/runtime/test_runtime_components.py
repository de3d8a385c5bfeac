"""A bundle whose decoder and text encoders are graphs draws what PyTorch draws, and runs none of their modules."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from obsdiff.errors import InputError
from obsdiff.export.bundle import list_files, open_bundle
from obsdiff.export.stage import export
from obsdiff.measure.latency import time_batch
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.progress import Progress
from obsdiff.runtime import components
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.server.engine import Engine, Watch
from obsdiff.runtime.server.messages import Key, Settings

PROMPTS, SEEDS = ["a red bag", "a small blue coat with long sleeves"], [3, 4]


def draw(pipe: Any, path: Path, prompts: list[str] = PROMPTS, **options: Any) -> list[Image.Image]:
    return generate(
        pipe, prompts, SEEDS[: len(prompts)], call_options(pipe, path, {"num_inference_steps": 2, **options})
    )


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """One with its signature that must not be called."""

    @functools.wraps(function)
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{function} was called")

    return refuse


def levels(some: list[Image.Image], others: list[Image.Image]) -> int:
    pairs = [[np.asarray(image, dtype=np.int16) for image in pair] for pair in zip(some, others, strict=True)]
    return max(int(np.abs(one - other).max()) for one, other in pairs)


@pytest.fixture(scope="module")
def pipe(graphed: Path) -> Any:
    return load(graphed, "onnxruntime", "cpu")


def test_pictures_are_those_of_pytorch_without_its_weights_or_modules(
    graphed: Path, one_block_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = draw(load(one_block_sd3, "torch", "cpu"), one_block_sd3)
    assert np.asarray(wanted[0]).std() > 1
    assert levels(draw(load(graphed, "torch", "cpu"), graphed), wanted) <= 1
    bundle = Path(shutil.copytree(graphed, tmp_path / "bundle"))
    for name in ("vae", "text_encoder", "text_encoder_2"):
        for path in (bundle / name).glob("*.safetensors"):
            path.unlink()
    value = json.loads((bundle / "manifest.json").read_text())
    value["files"] = {name: file.model_dump() for name, file in list_files(bundle).items()}
    (bundle / "manifest.json").write_text(json.dumps(value))

    for owner, names in (
        (diffusers.AutoencoderKL, ("decode", "from_pretrained")),
        (transformers.CLIPTextModelWithProjection, ("forward", "from_pretrained")),
        (torch.nn.functional, ("linear", "conv2d", "layer_norm", "group_norm", "embedding")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    pipe = load(bundle, "onnxruntime", "cpu")
    assert not [
        name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and [*part.parameters()]
    ]
    assert levels(draw(pipe, bundle), wanted) <= 1


@pytest.mark.parametrize(
    "family", ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "sdxl"))]
)
def test_text_encoders_are_graphs_in_every_kind_of_pipeline(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model, bundle = tiny_model(family), tmp_path / "bundle"
    manifest = export(model, bundle, formats=(), components=["text_encoders"])
    source = find_source(model)
    made = components.load_components(bundle, manifest, source.index, "cpu", torch.float32)
    assert set(made) == {name for name in source.index if name.startswith("text_encoder")}
    assert levels(draw(load_pipeline(source, torch.float32, **made), model), draw(load(model), model)) <= 1


def test_what_a_graph_does_not_give_is_refused_in_one_sentence(pipe: Any, graphed: Path) -> None:
    with pytest.raises(InputError, match=r"text_encoder gives 0, hidden_states.-2, not hidden_states.-3"):
        draw(pipe, graphed, clip_skip=1)
    ids = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(InputError, match="is not for attention_mask: use --backend torch"):
        pipe.text_encoder(ids, attention_mask=ids, output_hidden_states=True)
    with pytest.raises(InputError, match="is not for output_hidden_states False"):
        pipe.text_encoder(ids, output_hidden_states=False)
    with pytest.raises(InputError, match="input_ids of text_encoder has shape"):
        pipe.text_encoder(ids[:, :5], output_hidden_states=True)
    with pytest.raises(InputError, match="height 1 is outside"):
        pipe.vae.decode(torch.zeros(1, 8, 1, 8))
    with pytest.raises(InputError, match="only decodes"):
        pipe.vae.encode(torch.zeros(1, 3, 32, 32))


def test_where_graphs_cannot_run_the_modules_do_and_it_is_said(graphed: Path) -> None:
    told: list[str] = []
    progress = Progress()
    progress.message = told.append  # type: ignore[method-assign]
    manifest = open_bundle(graphed).model_copy(update={"precision": "bf16"})
    assert components.load_components(graphed, manifest, {}, "cpu", torch.float32, progress) == {}
    assert told == ["vae, text_encoder, text_encoder_2 run in torch: ONNX Runtime has no bf16 kernels for CPUs"]


def test_options_of_a_vae_that_do_not_apply_say_so(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="tiling does not apply"):
        pipe.vae.enable_tiling()
    with pytest.warns(UserWarning, match="slicing does not apply"):
        pipe.vae.enable_slicing()


def test_a_decoder_keeps_what_its_pipeline_reads_beside_it(tiny_model: Callable[[str], Path], graphed: Path) -> None:
    folder = tiny_model("flux2") / "vae"
    own = diffusers.AutoencoderKLFlux2.from_pretrained(folder)
    graph = open_bundle(graphed).graphs["vae"]
    made = components._make_decoder(folder, "AutoencoderKLFlux2", "vae", graph, lambda **_: [], "cpu", torch.float16)
    assert isinstance(made, diffusers.AutoencoderKLFlux2)
    assert torch.equal(made.bn.running_mean, own.bn.running_mean)  # type: ignore[union-attr, arg-type]
    assert torch.equal(made.bn.running_var, own.bn.running_var)  # type: ignore[union-attr, arg-type]
    assert {**made.config, "_name_or_path": None} == {**own.config, "_name_or_path": None}
    assert made.dtype == torch.float32, "its graph is"
    assert not list(made.parameters())


def test_a_server_draws_and_previews_with_graphs(graphed: Path, pipe: Any) -> None:
    engine = Engine(Settings(str(graphed), "onnxruntime", "cpu", 2))
    drawn = engine.draw(PROMPTS, SEEDS, Key(32, 32, 2, 4.0, None), Watch())
    assert levels([drawn[0], drawn[1]], draw(pipe, graphed, guidance_scale=4.0)) <= 1
    for shape in ((8, 8, 8), (8, 12, 4), (8, 64, 40)):
        assert engine.preview(torch.zeros(shape)), shape


def test_a_bench_times_text_and_decoding(graphed: Path, pipe: Any) -> None:
    sample = time_batch(pipe, 1, call_options(pipe, graphed, {"num_inference_steps": 2}))
    assert sample["text_encoding"] > 0
    assert sample["decode"] > 0
