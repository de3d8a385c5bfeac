"""Weights that are a variant, in several dtypes, or quantised: taken as they are stored, or refused in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from safetensors.torch import load_file, save_file

from obsdiff.checkpoint import denoiser_weights, read_info, verify
from obsdiff.errors import InputError
from obsdiff.export.inspect import inspect
from obsdiff.export.stage import export
from obsdiff.models.source import find_source, load_denoiser, load_pipeline
from obsdiff.models.weights import lone_variant, make_plain
from obsdiff.progress import Progress
from obsdiff.prune.stage import prune

PLAIN = "diffusion_pytorch_model.safetensors"
VARIANT = "diffusion_pytorch_model.fp16.safetensors"
OPTIONS: dict[str, Any] = {**QUICK, "pattern": "2:4", "solver": "magnitude", "steps": 1, "packages": 1}


class Said(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def model(one_block_sd3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_block_sd3, tmp_path / "model"))


def as_variant(model: Path, variant: str = "fp16", shard: str | None = None) -> None:
    """Saves the whole pipeline again as diffusers saves a variant, and only so."""
    pipe = load_pipeline(find_source(model))
    shutil.rmtree(model / "transformer")
    for weights in model.glob("*/*.safetensors"):
        weights.unlink()
    defaults = (model / "generation_config.json").read_text()
    pipe.save_pretrained(model, variant=variant, **({"max_shard_size": shard} if shard else {}))
    (model / "generation_config.json").write_text(defaults)


def convert(path: Path, kinds: dict[str, torch.dtype]) -> None:
    """Stores every tensor whose name holds a key in that dtype."""
    tensors = load_file(path)
    for part, dtype in kinds.items():
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if part in name}
    save_file(tensors, path)


@pytest.mark.parametrize("shard", [None, "100KB"], ids=["whole", "sharded"])
def test_a_variant_that_stands_alone_is_used_and_the_checkpoint_is_plain(
    model: Path, one_block_sd3: Path, tmp_path: Path, shard: str | None
) -> None:
    as_variant(model, shard=shard)
    assert not (model / "transformer" / PLAIN).exists()
    source, said = find_source(model), Said()
    assert source.variant == source.pipeline_variant == "fp16"
    assert len(denoiser_weights(source.denoiser_path).files) == (1 if shard is None else 3)
    prune(model, tmp_path / "out", progress=said, **OPTIONS)
    assert [text for text in said.messages if "variant fp16" in text]
    prune(one_block_sd3, tmp_path / "plain", **OPTIONS)
    found, wanted = (denoiser_weights(tmp_path / name / "transformer") for name in ("out", "plain"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not list((tmp_path / "out").rglob("*fp16*"))
    info = read_info(tmp_path / "out")
    assert info
    verify(find_source(tmp_path / "out"), info)
    load_pipeline(find_source(tmp_path / "out"))
    assert "(variant fp16)" in inspect(model)["about"]["weights"]
    assert "variant" not in inspect(tmp_path / "out")["about"]["weights"]


def test_a_variant_exports_to_a_bundle_that_draws(model: Path, tmp_path: Path) -> None:
    from obsdiff.runtime.pipeline import load

    as_variant(model)
    said = Said()
    export(model, tmp_path / "bundle", formats=(), progress=said)
    assert [text for text in said.messages if "variant fp16" in text]
    load(tmp_path / "bundle", "torch", "cpu")


def test_the_plain_weights_win_over_a_variant_beside_them(model: Path) -> None:
    weights = model / "transformer" / PLAIN
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights.with_name(VARIANT))
    (model / "vae" / PLAIN).rename(model / "vae" / VARIANT)  # which makes diffusers ask for the variant everywhere
    source = find_source(model)
    assert source.variant is None
    assert source.pipeline_variant == "fp16"
    pipe: Any = load_pipeline(source)
    assert all(module.proj_out.weight.any() for module in (load_denoiser(source), pipe.transformer))
    assert denoiser_weights(source.denoiser_path).files == [weights]


def test_two_variants_without_plain_weights_are_refused(model: Path) -> None:
    folder = model / "transformer"
    shutil.copy(folder / PLAIN, folder / "diffusion_pytorch_model.bf16.safetensors")
    (folder / PLAIN).rename(folder / VARIANT)
    with pytest.raises(InputError, match=r"transformer holds the variants bf16, fp16 and no plain weights"):
        find_source(model)


def test_components_with_different_variants_are_refused(model: Path) -> None:
    (model / "transformer" / PLAIN).rename(model / "transformer" / VARIANT)
    (model / "vae" / PLAIN).rename(model / "vae" / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(InputError, match=r"transformer only fp16 and vae only bf16|vae only bf16 and transformer"):
        find_source(model)


def test_make_plain_leaves_plain_weights_and_foreign_files_alone(tmp_path: Path) -> None:
    for name in (PLAIN, VARIANT, "notes.fp16.txt", "other.fp16.safetensors"):
        (tmp_path / name).write_text(name)
    make_plain(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: name for name in (PLAIN, VARIANT, "notes.fp16.txt", "other.fp16.safetensors")
    }
    assert lone_variant(tmp_path) is None


@pytest.mark.parametrize("pattern", ["2:4", "structured"])
def test_floating_dtypes_may_be_mixed_and_every_tensor_keeps_its_own(model: Path, tmp_path: Path, pattern: str) -> None:
    mixed = {"attn.to_out": torch.bfloat16, "attn.to_k": torch.float16, "net.2.": torch.float64}
    convert(model / "transformer" / PLAIN, mixed)
    options = {**OPTIONS, "pattern": pattern, "solver": "obs", **({"blocks": ":"} if pattern == "structured" else {})}
    prune(model, tmp_path / "out", **options)
    before, after = (denoiser_weights(path / "transformer") for path in (model, tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32, *mixed.values()}
    assert inspect(tmp_path / "out")["about"]["weights"] == "bfloat16, float16, float32, float64"
    export(tmp_path / "out", tmp_path / "bundle", formats=())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
def test_weights_that_are_not_in_full_precision_are_refused(model: Path, dtype: torch.dtype) -> None:
    convert(model / "transformer" / PLAIN, {"attn.to_q.weight": dtype})
    with pytest.raises(
        InputError, match=r"is quantised \(transformer_blocks.0.attn.to_q.weight is stored as .*take the"
    ):
        find_source(model)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        ({"quant_method": "gguf"}, "gguf"),
        ("something", "something"),
    ],
)
def test_a_config_that_says_quantised_is_refused(model: Path, entry: Any, named: str) -> None:
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": entry}))
    with pytest.raises(InputError, match=rf"is quantised \({named}\).*full precision"):
        find_source(model)


def test_gguf_weights_are_refused_as_a_file_and_in_a_folder(model: Path, tmp_path: Path) -> None:
    gguf = model / "transformer" / "flux1-dev-Q4_K.gguf"
    (model / "transformer" / PLAIN).rename(gguf)
    for path in (model, gguf):
        with pytest.raises(InputError, match=r"Q4_K.gguf is quantised \(GGUF\)"):
            find_source(path)
