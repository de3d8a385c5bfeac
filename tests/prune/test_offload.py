"""Offload: the model waits on the CPU, and nothing of the result depends on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from obsdiff.errors import InputError
from obsdiff.prune.calibration import whole_denoiser
from obsdiff.prune.stage import prune
from obsdiff.prune.stream import stream_hessians

from .folders import hashes
from .runs import Interrupting, linear_packages, make_run

OFFLOAD: dict[str, Any] = {
    "num_prompts": 4,
    "steps": 2,
    "batch_size": 2,
    "device": "cpu",
    "solver": "obs",
    "calibration": "stream",
    "offload": True,
}


def hooks_of(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if hasattr(part, "_hf_hook") or part._forward_pre_hooks]


def assert_whole(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert not hooks_of(module)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "asymmetric"},
        {"pattern": "structured+2:4", "blocks": ":", "heads": 0.25, "neurons": 0.3},
        {"pattern": "unstructured", "allocation": "error", "sparsity": 0.5},
    ],
    ids=str,
)
def test_it_changes_no_weight(tiny_sd3: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for offload in (True, False):
        prune(tiny_sd3, tmp_path / str(offload), **{**OFFLOAD, **options, "offload": offload})
    with_it, without = hashes(tmp_path / "True"), hashes(tmp_path / "False")
    assert {name for name in with_it if with_it[name] != without[name]} == {"obsdiff.json"}, "which names the option"


def test_the_model_is_whole_again_afterwards(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs", offload=True)
    before = {name: tensor.clone() for name, tensor in run.denoiser.state_dict().items()}
    with whole_denoiser(run):
        assert hooks_of(run.denoiser)
        assert {parameter.device.type for parameter in run.denoiser.parameters()} == {"meta"}
    assert_whole(run.denoiser, before)
    for _, hessians in stream_hessians(run, linear_packages(run), ()):
        assert hessians
        assert_whole(run.denoiser, before)
    assert_whole(run.denoiser, before)
    assert not any(hooks_of(part) for part in run.sampler.components.values() if isinstance(part, nn.Module))


def test_an_error_in_the_middle_leaves_the_model_whole(tiny_sd3: Path, tmp_path: Path) -> None:
    run = make_run(tiny_sd3, tmp_path, calibration="stream", solver="obs", offload=True)
    before = {name: tensor.clone() for name, tensor in run.denoiser.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), whole_denoiser(run):
        raise KeyboardInterrupt
    assert_whole(run.denoiser, before)


def test_an_interrupted_prune_goes_on_to_the_same_bytes(tiny_sd3: Path, tmp_path: Path) -> None:
    prune(tiny_sd3, tmp_path / "reference", **OFFLOAD)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_sd3, tmp_path / "out", progress=Interrupting(14), **OFFLOAD)
    prune(tiny_sd3, tmp_path / "out", **OFFLOAD)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "sampler"}, "^--offload needs --calibration stream"),
        ({"pattern": "structured", "target_speedup": 1.2}, "^--target-speedup cannot be measured with --offload"),
    ],
    ids=str,
)
def test_what_it_cannot_be_combined_with_is_refused(
    tiny_sd3: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_sd3, tmp_path / "out", **{**OFFLOAD, "solver": "auto", **options})
    assert not list(tmp_path.iterdir())
