"""Bad input, command by command: one sentence on standard error, the right exit code, and nothing written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import full_disk
from safetensors.torch import load_file, save_file

from cli import FEW, assert_sentence, call, tree
from obsdiff.checkpoint import WEIGHTS

QUICK_PRUNE = ("prune", "fashion", "out", *FEW)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the commands below are handed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a bag"}\n{"prompt": \n')
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "notes").write_text("notes")
    return tmp_path


@pytest.fixture
def model(one_block_sd3: Path, here: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(one_block_sd3, here / "model"))


BAD: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
    (("prune", "nowhere", "out"), ("nowhere does not exist",)),
    (("prune", "nobody-here/no-such-model", "out"), ("nobody-here/no-such-model", "hub")),
    (("prune", "notes", "out"), ("notes is a file",)),
    (("prune", "photos", "out"), ("photos is not a diffusers pipeline", "model_index.json")),
    (("prune", "fashion", "photos"), ("photos exists and is not a pruned checkpoint",)),
    (("prune", "fashion", "notes"), ("notes exists and is not a pruned checkpoint",)),
    ((*QUICK_PRUNE, "--pattern", "unstructured", "--sparsity", "0"), ("sparsity", "between 0 and 1")),
    ((*QUICK_PRUNE, "--pattern", "unstructured", "--sparsity", "1"), ("sparsity", "between 0 and 1")),
    ((*QUICK_PRUNE, "--pattern", "unstructured", "--sparsity", "-0.5"), ("sparsity", "between 0 and 1")),
    ((*QUICK_PRUNE, "--pattern", "unstructured", "--sparsity", "nan"), ("sparsity", "between 0 and 1")),
    ((*QUICK_PRUNE, "--pattern", "structured", "--heads", "1"), ("heads",)),
    ((*QUICK_PRUNE, "--pattern", "2:4", "--sparsity", "0.7"), ("2:4 is a sparsity of 0.5",)),
    ((*QUICK_PRUNE, "--pattern", "2:4", "--heads", "0.5"), ("heads", "structured")),
    ((*QUICK_PRUNE, "--pattern", "4:2"), ("4:2", "smaller than M")),
    ((*QUICK_PRUNE, "--pattern", "4:4"), ("4:4", "smaller than M")),
    ((*QUICK_PRUNE, "--pattern", "0:4"), ("0:4", "at least 1")),
    ((*QUICK_PRUNE, "--pattern", "zebra"), ("zebra", "unstructured", "structured")),
    ((*QUICK_PRUNE, "--pattern", "3:7"), ("transformer_blocks.0.attn.to_q", "not a multiple of 7", "--exclude")),
    ((*QUICK_PRUNE, "--solver", "oracle"), ("solver", "obs", "magnitude")),
    ((*QUICK_PRUNE, "--timestep-weighting", "sideways"), ("timestep-weighting", "log-decrease")),
    ((*QUICK_PRUNE, "--dtype", "int8"), ("dtype", "bfloat16")),
    ((*QUICK_PRUNE, "--blocks", "8:"), ("--blocks 8:", "none of the 8 blocks")),
    ((*QUICK_PRUNE, "--blocks", "-:2"), ("--blocks -:2", "A:B")),
    ((*QUICK_PRUNE, "--include", "zebra"), ("no linear matches", "zebra")),
    ((*QUICK_PRUNE, "--exclude", "("), ("not a regular expression",)),
    ((*QUICK_PRUNE, "--prompts", "empty.txt"), ("empty.txt holds no prompt",)),
    ((*QUICK_PRUNE, "--prompts", "missing.txt"), ("missing.txt cannot be read",)),
    ((*QUICK_PRUNE, "--prompts", "photos"), ("photos cannot be read",)),
    ((*QUICK_PRUNE, "--prompts", "binary.txt"), ("binary.txt cannot be read",)),
    ((*QUICK_PRUNE, "--prompts", "bad.jsonl"), ("bad.jsonl, line 2",)),
    ((*QUICK_PRUNE, "--num-prompts", "0"), ("num-prompts", "at least 1")),
    ((*QUICK_PRUNE, "--batch-size", "0"), ("batch-size",)),
    ((*QUICK_PRUNE, "--packages", "0"), ("packages",)),
    ((*QUICK_PRUNE, "--device", "abacus"), ("--device abacus",)),
    (("export", "nowhere", "bundle"), ("nowhere does not exist",)),
    (("export", "photos", "bundle"), ("photos is not a diffusers pipeline",)),
    (("export", "fashion", "photos"), ("photos exists and is not a bundle",)),
    (("export", "fashion", "notes"), ("notes exists and is not a bundle",)),
    (("export", "fashion", "photos", "--force"), ("photos exists and is not a bundle",)),
    (("export", "fashion", "bundle", "--format", "papyrus"), ("--format papyrus", "onnx")),
    (("export", "fashion", "bundle", "--precision", "int4"), ("--precision int4", "fp16")),
    (("export", "fashion", "bundle", "--batch", "4:2:8"), ("--batch 4:2:8", "MIN <= OPT <= MAX")),
    (("export", "fashion", "bundle", "--batch", "0:1:1"), ("--batch 0:1:1", "MIN <= OPT <= MAX")),
    (("export", "fashion", "bundle", "--batch", "many"), ("--batch many", "MIN:OPT:MAX")),
    (("export", "fashion", "bundle", "--size", "64:100:128"), ("--size 64:100:128: sides must be multiples of",)),
    (("inspect", "nowhere"), ("nowhere does not exist",)),
    (("inspect", "notes"), ("notes is a file",)),
    (("inspect", "photos", "--json"), ("photos is not a diffusers pipeline",)),
    (("run", "nowhere", "a bag"), ("nowhere does not exist",)),
    (("run", "fashion", "a bag", "--out", "z.jpg"), ("--out z.jpg", "z.png")),
    (("prune", "fashion", "."), ("exists and is not a pruned checkpoint",)),
    (("prune", "fashion", "nothing/../photos"), ("photos exists and is not a pruned checkpoint",)),
    ((*QUICK_PRUNE, "--target-size", "0.05"), ("the least is --target-size 0.", "with --blocks 1:-1")),
    ((*QUICK_PRUNE, "--pattern", "2:4", "--target-size", "0.8"), ("--target-size needs --pattern structured",)),
    ((*QUICK_PRUNE, "--call-share", "0.5"), ("--call-share is an option of --calibration stream",)),
    (("run", "photos", "a bag", "--out", "new/x.png"), ("photos is not a diffusers pipeline",)),
    (("run", "fashion", "a bag", "--backend", "onnxruntime"), ("fashion is not a bundle",)),
    (("bench", "nowhere"), ("nowhere does not exist",)),
    (("bench", "fashion", "photos", "--json"), ("photos is not a diffusers pipeline",)),
    (("prune", "[red]no :100:", "out"), ("[red]no :100: does not exist",)),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(map(str, value)))
def test_bad_input_is_one_sentence_and_writes_nothing(
    here: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    before = tree(here)
    assert_sentence(call(*arguments), 2, *words)
    assert tree(here) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("polish", "fashion"), "No such command 'polish'"),
        (("prune", "fashion"), "Missing argument 'out'"),
        (("run", "fashion"), "Missing argument 'prompt"),
        (("prune", "fashion", "out", "--sparsty", "0.5"), "No such option: --sparsty"),
        (("prune", "fashion", "out", "--sparsity", "half"), "Invalid value for '--sparsity'"),
        (("prune", "fashion", "out", "--steps", "0"), "Invalid value for '--steps'"),
        (("run", "fashion", "a bag", "--height", "2"), "Invalid value for '--height'"),
        (("bench", "fashion", "--runs", "0"), "Invalid value for '--runs'"),
    ],
    ids=str,
)
def test_bad_usage_says_what_is_wrong_and_exits_with_2(here: Path, arguments: tuple[str, ...], words: str) -> None:
    before = tree(here)
    result = call(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert words.lower() in " ".join(result.err.replace("│", " ").split()).lower()
    assert "Traceback" not in result.err
    assert tree(here) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model: Path, value: float) -> None:
    file = model / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["transformer_blocks.0.ff.net.2.weight"][3, 5] = value
    save_file(tensors, file)
    before = tree(model.parent)
    assert_sentence(call("prune", "model", "out", *FEW), 2, "transformer_blocks.0.ff.net.2.weight holds NaN")
    assert tree(model.parent) == before


@pytest.mark.parametrize("command", ["prune", "export", "inspect", "run"])
@pytest.mark.parametrize("damage", ["truncated", "pickle", "family", "config"])
def test_a_damaged_model_is_one_sentence_for_every_command(model: Path, command: str, damage: str) -> None:
    file = model / "transformer" / WEIGHTS
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "pickle":
        file.rename(file.with_suffix(".bin"))
    elif damage == "config":
        (model / "transformer" / "config.json").write_text("[]")
    else:
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "Other2DModel"]}))
    before = tree(model.parent)
    rest: dict[str, tuple[object, ...]] = {
        "prune": ("out", *FEW),
        "export": ("bundle",),
        "inspect": (),
        "run": ("a bag", "--out", "x.png"),
    }
    words = {
        "truncated": "is truncated",
        "pickle": "pickle",
        "config": "config.json",
        "family": "SD3Transformer2DModel",
    }
    assert_sentence(call(command, "model", *rest[command]), 2, words[damage])
    assert tree(model.parent) == before


def test_a_disk_that_fills_up_while_pruning_is_one_sentence_and_it_goes_on_later(model: Path) -> None:
    prune: tuple[Any, ...] = ("prune", "model", "out", *FEW, "--solver", "magnitude")
    before = tree(model)
    with full_disk(60_000):
        result = call(*prune)
    assert_sentence(result, 1)
    assert not (model.parent / "out").exists()
    assert tree(model) == before
    assert not [name for name in tree(model.parent) if name.endswith(".safetensors.part")]
    assert call(*prune).code == 0
    assert call("inspect", "out").code == 0


def test_a_folder_that_cannot_be_written_to_is_one_sentence(here: Path) -> None:
    result = call("run", "fashion", "a bag", "--out", "notes/x.png", "--steps", 1, "--device", "cpu")
    assert_sentence(result, 1, "notes")
    assert (here / "notes").read_text() == "notes"


def test_cuda_is_refused_in_one_sentence_where_there_is_none(here: Path) -> None:
    number = torch.cuda.device_count() + 3
    before = tree(here)
    assert_sentence(call("run", "fashion", "a bag", "--device", f"cuda:{number}"), 2, "cuda")
    assert tree(here) == before
