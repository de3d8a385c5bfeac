"""Sana where norms reach across heads: no head goes, neurons do; and a pipeline of few steps with embedded guidance."""

from pathlib import Path

import pytest
import torch
from tiny import sana

from obsdiff.errors import InputError
from obsdiff.export.stage import export
from obsdiff.models import GroupRecord, walk
from obsdiff.models.source import find_source, meta_denoiser
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load

OPTIONS = {"pattern": "structured+2:4", "num_prompts": 2, "solver": "obs", "packages": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return sana.make(tmp_path_factory.mktemp("sana") / "sprint", sprint=True)


def test_heads_that_are_normalised_together_stay(sprint: Path, tmp_path: Path) -> None:
    source = find_source(sprint)
    denoiser = meta_denoiser(source)
    stages = walk.group_stages(denoiser, source.spec)
    assert {stage.group.kind for stage in stages if stage.group} == {"neurons"}
    with pytest.raises(InputError, match=r"can lose none: transformer_blocks\.0\.attn1\.norm_q works on all heads"):
        prune(sprint, tmp_path / "pruned", heads=0.5, **OPTIONS)
    with pytest.raises(InputError, match="has no such group there"):
        walk.find_group(denoiser, source.spec, GroupRecord(block=0, name="attn1", kind="heads", kept=[0], of=4))


def test_the_pipeline_of_two_steps_goes_the_whole_way(sprint: Path, tmp_path: Path) -> None:
    info = prune(sprint, tmp_path / "pruned", blocks=":", **OPTIONS)
    assert {group.kind for group in info.groups} == {"neurons"}
    export(tmp_path / "pruned", tmp_path / "bundle")
    drawn = []
    for path, backend in (("pruned", "torch"), ("bundle", "torch"), ("bundle", "onnxruntime")):
        pipe = load(tmp_path / path, backend, "cpu")
        drawn.append(generate(pipe, ["a red bag"], [3], call_options(pipe, tmp_path / path), "latent"))
    for other in drawn[1:]:
        assert (other - drawn[0]).norm() < 1e-3 * drawn[0].norm()
