"""PixArt as a graph: its own size is one of many, the mask hides tokens, and Σ is told no sizes."""

from typing import Any

import pytest
import torch
from tiny import pixart

from obsdiff.export import onnx
from obsdiff.export.ranges import make_axes
from obsdiff.models import graph
from obsdiff.models.source import Source, find_source, load_denoiser


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    return find_source(pixart.make(tmp_path_factory.mktemp("pixart") / "sigma", sigma=True))


@pytest.fixture(scope="module")
def session(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import onnxruntime

    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    axes = make_axes(source, "1:1:2", "16:512:768")
    onnx.export_onnx(load_denoiser(source, torch.float32), source.spec, source.config, axes, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_sigma_is_told_no_sizes(source: Source) -> None:
    names = [entry.name for entry in source.spec.graph_inputs(source.config)]
    assert names == ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (4, 10), (16, 16)])
@torch.no_grad()
def test_the_graph_takes_every_size(source: Source, session: Any, height: int, width: int) -> None:
    """128 is the denoiser's own, for which it keeps position embeddings."""
    denoiser = load_denoiser(source, torch.float32)
    assert denoiser.pos_embed.height == 64
    inputs = graph.random_inputs(
        source.spec, source.config, {"batch": 1, "height": height, "width": width, "tokens": 9}
    )
    wanted = denoiser(**inputs, return_dict=False)[0]
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert (torch.from_numpy(found) - wanted).norm() < 1e-4 * wanted.norm()


def test_tokens_outside_the_mask_count_for_nothing(source: Source, session: Any) -> None:
    inputs = graph.random_inputs(source.spec, source.config, {"batch": 1, "height": 4, "width": 6, "tokens": 9})
    inputs["encoder_attention_mask"][:, 5:] = 0
    inputs["encoder_attention_mask"][:, :5] = 1
    feeds = {name: value.numpy() for name, value in inputs.items()}
    (first,) = session.run(None, feeds)
    short = {name: value[:, :5] if name.startswith("encoder") else value for name, value in feeds.items()}
    (second,) = session.run(None, short)
    torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(second), rtol=1e-4, atol=1e-4)
