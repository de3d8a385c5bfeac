"""U-Nets in half precision, and where a convolution's zeros lie in the graph."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from obsdiff.export.bundle import GRAPH
from obsdiff.export.stage import export
from obsdiff.prune.stage import prune

OPTIONS = {"num_prompts": 2, "steps": 1, "batch_size": 2, "packages": 1, "device": "cpu", "solver": "magnitude"}


@pytest.mark.slow
def test_sdxl_in_half_precision_keeps_2_4_along_input_channels(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The embedded sizes are float32 and joined to the pooled prompt, which ONNX allows for one kind of number only."""
    prune(tiny_model("sdxl"), tmp_path / "pruned", **OPTIONS, pattern="2:4")
    manifest = export(tmp_path / "pruned", tmp_path / "bundle", precision="fp16")
    assert {entry.name: entry.dtype for entry in manifest.inputs} == {
        "sample": "float16",
        "timestep": "float32",
        "encoder_hidden_states": "float16",
        "text_embeds": "float32",
        "time_ids": "float32",
    }
    graph = onnx.load(tmp_path / "bundle" / GRAPH).graph
    weights = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in graph.initializer}
    found = {name: weights[name] for node in graph.node if node.op_type == "Conv" for name in node.input[1:2]}
    dense = [name for name, weight in found.items() if (weight != 0).unflatten(1, (-1, 4)).sum(2).gt(2).any()]
    assert len(found) == 25
    assert {name.removeprefix("denoiser.") for name in dense} == {"conv_in.weight", "conv_out.weight"}
