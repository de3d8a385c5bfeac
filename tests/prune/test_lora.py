"""prune --lora: fused before anything is pruned, recorded, and refused where it cannot be what was meant.

diffusers fuses through the package peft, an extra: without it (test_without_peft) the arithmetic is done by hand here,
so that all but the calls of diffusers in base.fuse are tested; test_diffusers_fuses_as_the_arithmetic_says needs it.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file, save_file
from torch import Tensor

from obsdiff.checkpoint import denoiser_weights, read_info
from obsdiff.errors import InputError
from obsdiff.files import folder_hash, sha256
from obsdiff.models.source import find_source, load_pipeline
from obsdiff.prune import base
from obsdiff.prune.base import Lora, find_lora, parse_lora
from obsdiff.prune.stage import prune

PEFT = importlib.util.find_spec("peft") is not None
OPTIONS: dict[str, Any] = {**QUICK, "pattern": "2:4", "solver": "magnitude", "steps": 1, "packages": 1}
TARGETS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2")
RANK = 4


@pytest.fixture
def lora(one_block_sd3: Path, tmp_path: Path) -> Path:
    """Rank 4, on one attention and one FFN projection, in the names that diffusers saves."""
    generator, weights, tensors = torch.Generator().manual_seed(0), stored(one_block_sd3), {}
    for name in TARGETS:
        out, columns = weights[f"{name}.weight"].shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def stored(path: Path) -> dict[str, Tensor]:
    return dict(denoiser_weights(path / "transformer"))


def by_hand(weights: dict[str, Tensor], lora: Path, scale: float) -> dict[str, Tensor]:
    """W + scale B A: alpha is the rank where a file names none."""
    parts, fused = load_file(lora), dict(weights)
    for name in TARGETS:
        a, b = (parts[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        weight = fused[f"{name}.weight"]
        fused[f"{name}.weight"] = (weight.float() + scale * (b @ a)).to(weight.dtype)
    return fused


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers and peft do to a pipeline, by hand."""

    def fuse(pipe: Any, path: Path, lora: Lora) -> None:
        pipe.transformer.load_state_dict(by_hand(pipe.transformer.state_dict(), path, lora.scale))

    monkeypatch.setattr(base, "fuse", fuse)
    monkeypatch.setattr(base, "check_peft", lambda: None)


@pytest.mark.usefixtures("arithmetic")
def test_the_checkpoint_is_the_fused_base_pruned(one_block_sd3: Path, lora: Path, tmp_path: Path) -> None:
    before = folder_hash(one_block_sd3)
    info = prune(one_block_sd3, tmp_path / "out", lora=[f"{lora}:0.5"], **OPTIONS)
    found, wanted = stored(tmp_path / "out"), by_hand(stored(one_block_sd3), lora, 0.5)
    assert set(found) == set(wanted)
    pruned = {f"{layer.name}.weight" for layer in info.layers}
    for name, tensor in found.items():
        kept = tensor != 0 if name in pruned else slice(None)  # magnitude changes no weight that stays
        assert torch.equal(tensor[kept], wanted[name][kept]), name
    for name in TARGETS:
        assert (found[f"{name}.weight"] == 0).sum() == found[f"{name}.weight"].numel() // 2
    recorded = read_info(tmp_path / "out")
    assert recorded
    assert recorded.recipe["lora"] == [{"name": str(lora), "scale": 0.5, "sha256": sha256(lora)}]
    assert recorded.base["sha256"] == before == folder_hash(one_block_sd3)
    assert not list(tmp_path.glob("out.partial*"))
    load_pipeline(find_source(tmp_path / "out"))


@pytest.mark.usefixtures("arithmetic")
def test_several_add_up_and_another_scale_is_another_prune(one_block_sd3: Path, lora: Path, tmp_path: Path) -> None:
    prune(one_block_sd3, tmp_path / "twice", lora=[f"{lora}:0.5", str(lora)], **OPTIONS)
    prune(one_block_sd3, tmp_path / "once", lora=[f"{lora}:1.5"], **OPTIONS)
    twice, once = stored(tmp_path / "twice"), stored(tmp_path / "once")
    assert all(torch.allclose(twice[name], once[name], atol=1e-3) for name in once)
    prune(one_block_sd3, tmp_path / "once", lora=[f"{lora}:1.5"], **OPTIONS)  # finished already
    with pytest.raises(InputError, match="another recipe"):
        prune(one_block_sd3, tmp_path / "once", lora=[f"{lora}:1.4"], **OPTIONS)


@pytest.mark.usefixtures("arithmetic")
def test_the_fused_base_keeps_the_stored_dtype_and_links_the_rest(
    one_block_sd3: Path, lora: Path, tmp_path: Path
) -> None:
    source = find_source("fashion")
    weights = dict(denoiser_weights(source.denoiser_path))
    fused = base.assemble(find_source(one_block_sd3), False, base.record_loras([str(lora)]), tmp_path / "base")
    assert fused.denoiser_path == tmp_path / "base" / "transformer"
    assert (tmp_path / "base" / "vae" / "config.json").is_symlink()
    assert {t.dtype for t in stored(tmp_path / "base").values()} == {t.dtype for t in stored(one_block_sd3).values()}
    assert weights
    again = base.assemble(find_source(one_block_sd3), False, (), tmp_path / "base")  # whole, so it is taken
    assert again == fused


def test_a_lora_that_changes_nothing_is_refused(
    one_block_sd3: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "check_peft", lambda: None)
    monkeypatch.setattr(base, "fuse", lambda pipe, path, lora: None)  # what diffusers does with foreign names
    with pytest.raises(InputError, match=r"style.safetensors changes no weight of the SD3Transformer2DModel"):
        prune(one_block_sd3, tmp_path / "out", lora=[str(lora)], **OPTIONS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(PEFT, reason="peft is installed")
def test_without_peft(one_block_sd3: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'^--lora needs the package peft: pip install "obsdiff\[lora\]"$'):
        prune(one_block_sd3, tmp_path / "out", lora=[str(lora)], **OPTIONS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(not PEFT, reason="needs peft (obsdiff[lora])")
def test_diffusers_fuses_as_the_arithmetic_says(one_block_sd3: Path, lora: Path, tmp_path: Path) -> None:
    loras = base.record_loras([f"{lora}:0.5", f"{lora}:0.25"])
    base.assemble(find_source(one_block_sd3), False, loras, tmp_path / "base")
    found, wanted = stored(tmp_path / "base"), by_hand(stored(one_block_sd3), lora, 0.75)
    assert all(torch.allclose(found[name].float(), wanted[name].float(), atol=1e-5, rtol=1e-4) for name in wanted)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("owner/name:-2", "owner/name", -2.0),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", 1.0),
        ("C:/loras/a.safetensors:2", "C:/loras/a.safetensors", 2.0),
    ],
)
def test_path_and_scale(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (path, scale)


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_that_is_no_number(scale: str) -> None:
    with pytest.raises(InputError, match="is no number to multiply with"):
        parse_lora(f"a.safetensors:{scale}")


@pytest.mark.parametrize("key", ["x.dora_scale", "x.lora_magnitude_vector"])
def test_a_dora_is_refused(tmp_path: Path, key: str) -> None:
    save_file({"x.lora_A.weight": torch.ones(1), key: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is a DoRA"):
        find_lora(str(tmp_path / "a.safetensors"))


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not that")
    for name, words in (
        ("a.safetensors", "holds no LoRA"),
        ("b.safetensors", "truncated or is not safetensors"),
        ("c.bin", "a pickle, which can run code"),
        ("", "is a folder: name the .safetensors file"),
        ("missing.safetensors", "does not exist|could not be fetched"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_lora(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no-such-lora.* could not be fetched from the hub"):
        find_lora("nobody-here/no-such-lora-of-obsdiff")


def test_at_run_time_a_lora_is_refused_with_the_reason(
    pruned: dict[str, Path], graphless: Path, one_block_sd3: Path
) -> None:
    from obsdiff.runtime.pipeline import load

    for path, why in ((pruned["2:4"], "would fill its zeros again"), (graphless, "weights of a bundle are fixed")):
        pipe: Any = load(path, device="cpu", backend="torch")
        with pytest.raises(InputError, match=rf"takes no LoRA: .*{why}; .*obsdiff prune --lora"):
            pipe.load_lora_weights("style.safetensors")
    pipe = load(one_block_sd3, device="cpu")
    assert pipe.load_lora_weights.__name__ == "load_lora_weights"
