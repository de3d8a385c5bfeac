"""What the common tests do not show of Wan: no heads, one frame, two calls a step, a timestep for each token."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.errors import InputError
from obsdiff.export.stage import export
from obsdiff.measure.latency import bench
from obsdiff.models.source import find_source
from obsdiff.progress import Progress
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

QUICK: dict[str, Any] = {"num_prompts": 4, "steps": 2, "batch_size": 2, "solver": "obs", "device": "cpu"}


class Told(Progress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def wan(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("wan")


def test_asked_for_heads_it_says_why_none_can_go(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--heads 0.3: .* can lose none: .* across all heads"):
        prune(wan, tmp_path / "out", pattern="structured", heads=0.3, **QUICK)
    assert not list(tmp_path.iterdir())


def test_structured_pruning_takes_neurons_and_says_so_once(wan: Path, tmp_path: Path) -> None:
    told = Told()
    info = prune(wan, tmp_path / "out", pattern="structured", blocks=":", progress=told, **QUICK)
    assert [text for text in told.messages if "no heads" in text] == told.messages
    assert len(told.messages) == 1
    assert {(group.name, group.kind) for group in info.groups} == {("ffn", "neurons")}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_stream_sees_both_calls_of_a_step(
    wan: Path, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsdiff.prune import stream

    seen: list[torch.Tensor] = []
    record = stream._record

    def keep(*args: Any) -> Any:
        calls = record(*args)
        seen.extend(call.shared["encoder_hidden_states"] for call in calls)
        return calls

    monkeypatch.setattr(stream, "_record", keep)
    prune(wan, tmp_path / "out", pattern="2:4", calibration="stream", call_share=share, **QUICK)
    assert len(seen) == 2 * 2 * 2 * share  # batches, steps, with and without the prompt
    assert all(torch.equal(seen[0], value) for value in seen[:2]) is False
    without = [value for value in seen if torch.equal(value[0], value[1])]  # the empty prompt, twice
    assert len(without) == len(seen) / 2


def test_two_denoisers_are_refused_by_name(wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wan2.2"
    shutil.copytree(wan, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.9}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"several denoisers \(transformer, transformer_2\)"):
        find_source(folder)


def test_one_frame_is_a_picture_and_can_be_timed(wan: Path) -> None:
    pipe = load(wan, device="cpu")
    options = call_options(pipe, wan, {"num_inference_steps": 1, "num_frames": 9})
    assert options["num_frames"] == 1
    (image,) = generate(pipe, ["a red bag"], [3], options)
    assert image.size == (64, 64)
    assert generate(pipe, ["a red bag"], [3], options, "pt").shape == (1, 3, 64, 64)
    assert generate(pipe, ["a red bag"], [3], options, "latent").shape == (1, 16, 8, 8)
    (result,) = bench([wan], runs=1, warmup=0, memory=False, device="cpu", num_inference_steps=1)["results"]
    assert result["stages_ms"]["denoiser_call"] > 0


def test_a_timestep_for_each_token_is_one_for_all(wan: Path, tmp_path: Path) -> None:
    """Wan 2.2's 5B model: `expand_timesteps`."""
    folder, bundle = tmp_path / "wan2.2-5b", tmp_path / "bundle"
    shutil.copytree(wan, folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    export(folder, bundle, formats=())
    drawn = []
    for path in (folder, bundle):
        pipe = load(path, "torch", "cpu")
        options = call_options(pipe, path, {"num_inference_steps": 2})
        drawn.append(generate(pipe, ["a red bag"], [3], options, "latent"))
    assert (drawn[0] - drawn[1]).norm() < 1e-5 * drawn[0].norm()
