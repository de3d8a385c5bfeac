"""Models that every test may use: a random SD3 with the oddities of the family, and prunes of the embedded one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

QUICK: dict[str, Any] = {
    "num_prompts": 4,
    "steps": 2,
    "batch_size": 4,
    "packages": 2,
    "allocation": "uniform",
    "device": "cpu",
}
"""Options of a prune that takes about a second."""


def make_sd3(folder: Path, **changes: Any) -> Path:
    """Saves a random SD3 pipeline around the embedded model's encoders and decoder, in float32: 4 heads of 8."""
    from diffusers import SD3Transformer2DModel

    from obsdiff.models.source import find_source, load_pipeline

    torch.manual_seed(0)
    source = find_source("fashion")
    config = {
        **source.config,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        **changes,
    }
    transformer = SD3Transformer2DModel.from_config(config)
    with torch.no_grad():  # as it is initialised, a block adds too little to its input for a test to see
        for name, parameter in transformer.transformer_blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3)
    load_pipeline(source, torch.float32, transformer=transformer).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(dict(source.defaults)))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_latency_cache() -> Iterator[None]:
    """Timings that one test kept must not reach another: a folder that cannot be made keeps nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OBSDIFF_CACHE", "/dev/null/obsdiff")
        yield


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3 with the oddities of the family: the first of its 3 blocks has a second attention (SD3.5-medium),
    all have query and key norms, the last has no context output."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    return make_sd3(folder, num_layers=3, dual_attention_layers=[0], qk_norm="rms_norm")


@pytest.fixture(scope="session")
def tiny_model(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the tiny random pipeline of a family (tests/tiny), once a session. To read, not to change."""
    made = {"sd3": tiny_sd3, "fashion": Path("fashion")}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tiny.make(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def one_block_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3 with one block: what is traced fastest."""
    return make_sd3(tmp_path_factory.mktemp("models") / "one-block-sd3", num_layers=1)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the embedded model by pattern: 2:4, unstructured, structured. To read, not to change."""
    from obsdiff.prune.stage import prune

    folder = tmp_path_factory.mktemp("pruned")
    paths = {pattern: folder / pattern.replace(":", "-") for pattern in ("2:4", "unstructured", "structured")}
    for pattern, path in paths.items():
        prune("fashion", path, pattern=pattern, **QUICK)
    return paths


@pytest.fixture(scope="session")
def bundles(pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of the embedded model: dense and structured. To read, not to change."""
    from obsdiff.export.stage import export

    folder = tmp_path_factory.mktemp("bundles")
    paths = {"dense": folder / "dense", "structured": folder / "structured"}
    export("fashion", paths["dense"])
    export(pruned["structured"], paths["structured"])
    return paths


@pytest.fixture(scope="session")
def one_block_bundle(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the model with one block, with its graph. To read or copy."""
    from obsdiff.export.stage import export

    bundle = tmp_path_factory.mktemp("bundles") / "one-block"
    export(one_block_sd3, bundle)
    return bundle


@pytest.fixture(scope="session")
def graphed(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the model with one block whose decoder and text encoders are graphs too. To read or copy."""
    from obsdiff.export.stage import export

    bundle = tmp_path_factory.mktemp("bundles") / "graphed"
    export(one_block_sd3, bundle, components=["denoiser", "vae", "text_encoders"])
    return bundle


@pytest.fixture(scope="session")
def graphless(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the model with one block, without a graph: it runs on the torch backend alone. To read or copy."""
    from obsdiff.export.stage import export

    bundle = tmp_path_factory.mktemp("bundles") / "graphless"
    export(one_block_sd3, bundle, formats=())
    return bundle
