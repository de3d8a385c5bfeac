"""The export stage: a bundle or nothing, whatever stands in the way or happens on the way."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import obsdiff
from obsdiff.checkpoint import read_info
from obsdiff.errors import InputError
from obsdiff.export.bundle import open_bundle
from obsdiff.export.ranges import make_axes
from obsdiff.export.schema import Axis, EngineOptions
from obsdiff.export.stage import export
from obsdiff.export.totals import count_nonzero
from obsdiff.models.source import find_source, load_denoiser, load_pipeline
from obsdiff.prune.stage import prune


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below the folder, hidden ones included, with a hash of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def export_quickly(model: str | Path, bundle: Path, **options: Any) -> None:
    """Without a graph: everything but tracing and checking it."""
    export(model, bundle, formats=(), **options)


@pytest.fixture(scope="module")
def sparse(one_block_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with one block, 2:4."""
    out = tmp_path_factory.mktemp("sparse") / "pruned"
    prune(one_block_sd3, out, pattern="2:4", solver="magnitude", num_prompts=1, steps=1, packages=1, device="cpu")
    return out


def test_a_semi_structured_checkpoint_keeps_its_zeros(sparse: Path, one_block_sd3: Path, tmp_path: Path) -> None:
    manifest = obsdiff.export(sparse, tmp_path / "bundle")
    assert manifest == open_bundle(tmp_path / "bundle")
    assert manifest.recipe is not None
    assert (manifest.recipe["pattern"], manifest.groups) == ("2:4", [])
    assert manifest.base["name"] == str(one_block_sd3)
    assert manifest.totals.parameters == manifest.dense.parameters
    assert manifest.totals.macs == manifest.dense.macs
    info = read_info(sparse)
    assert info is not None
    assert len(info.layers) == 6 + 1 + 2  # projections, out, feed-forward: the only block has no context output
    before = count_nonzero(load_denoiser(find_source(one_block_sd3)).state_dict())
    assert manifest.totals.nonzero == before - sum(layer.shape[0] * layer.shape[1] // 2 for layer in info.layers)
    assert not {"obsdiff.json", "masks.safetensors"} & set(manifest.files)


def test_a_dense_model_has_no_recipe(graphless: Path, one_block_sd3: Path) -> None:
    manifest = open_bundle(graphless)
    assert (manifest.recipe, manifest.groups, manifest.formats) == (None, [], {})
    assert manifest.dense == manifest.totals.model_copy(update={"nonzero": manifest.dense.nonzero})
    assert manifest.base["name"] == str(one_block_sd3)
    assert manifest.vae_scale == 4
    assert {"torch", "diffusers", "onnx", "onnxruntime", "obsdiff", "python"} <= set(manifest.versions)


def test_a_structured_checkpoint_loses_its_units(bundles: dict[str, Path]) -> None:
    manifest = open_bundle(bundles["structured"])
    assert manifest.totals.parameters < manifest.dense.parameters
    assert manifest.totals.macs < manifest.dense.macs
    assert manifest.totals.bytes == 4 * manifest.totals.parameters


def test_components_are_copied_untouched(graphless: Path, one_block_sd3: Path) -> None:
    copied, own = snapshot(graphless), snapshot(one_block_sd3)
    assert {name: copied.get(name) for name in own if not name.startswith("transformer")} == {
        name: value for name, value in own.items() if not name.startswith("transformer")
    }
    assert {name for name in copied if name not in own} == {
        "manifest.json",
        "denoiser",
        "denoiser/config.json",
        "denoiser/model.safetensors",
        "receipt.json",
    }


def test_the_same_export_gives_the_same_bytes(graphless: Path, one_block_sd3: Path, tmp_path: Path) -> None:
    export_quickly(one_block_sd3, tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(graphless)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"formats": ["coreml"]}, "--format coreml: there are onnx"),
        ({"formats": ["onnx", ""]}, "--format : there are onnx, tensorrt"),
        ({"precision": "int8"}, "--precision int8: there are fp32, fp16, bf16"),
        ({"options": EngineOptions(sm=("86",))}, "--sm is for --format tensorrt or tensorrt-rtx"),
        ({"formats": ["tensorrt-rtx"], "options": EngineOptions(sm=("90",))}, "--sm 90: TensorRT-RTX .* knows"),
        ({"formats": ["tensorrt-rtx"], "timing_cache": "timings"}, "--timing-cache is for --format tensorrt:"),
        ({"batch": "8"}, "--batch 8: write MIN:OPT:MAX"),
        ({"batch": "1:2"}, "--batch 1:2: write MIN:OPT:MAX"),
        ({"batch": "1:2:3:4"}, "--batch 1:2:3:4: write MIN:OPT:MAX"),
        ({"batch": "a:b:c"}, "--batch a:b:c: write MIN:OPT:MAX"),
        ({"batch": ""}, "--batch : write MIN:OPT:MAX"),
        ({"batch": "0:1:8"}, "--batch 0:1:8: needs 1 <= MIN <= OPT <= MAX"),
        ({"batch": "4:2:8"}, "--batch 4:2:8: needs"),
        ({"batch": "1:9:8"}, "--batch 1:9:8: needs"),
        ({"batch": "-1:1:8"}, "--batch -1:1:8: needs"),
        ({"size": "16:32"}, "--size 16:32: write MIN:OPT:MAX"),
        ({"size": "16:32:33"}, "--size 16:32:33: sides must be multiples of 8 pixels"),
        ({"size": "4:32:32"}, "--size 4:32:32: sides must be multiples of 8 pixels"),
        ({"size": "0:32:32"}, "--size 0:32:32: needs"),
        ({"size": "32:16:48"}, "--size 32:16:48: needs"),
        ({"size": "16:64:128"}, "does not run at .*(latents)"),
    ],
    ids=str,
)
def test_bad_options_are_refused_and_nothing_is_written(
    one_block_sd3: Path, tmp_path: Path, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        export(one_block_sd3, tmp_path / "bundle", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_bundle_cannot_be_exported_again(graphless: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a bundle, the result of an export"):
        export_quickly(graphless, tmp_path / "bundle")


def test_a_checkpoint_that_was_changed_is_refused(sparse: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(sparse, tmp_path / "model"))
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["transformer_blocks.0.attn.to_q.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"attn\.to_q has weights where its mask says zero"):
        export_quickly(model, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_axes_come_from_images_and_pixels(one_block_sd3: Path) -> None:
    source = find_source(one_block_sd3)
    axes = make_axes(source, "2:3:5", "16:24:40")
    assert axes["batch"] == Axis(min=2, opt=6, max=10)  # with guidance an image is two calls
    assert axes["height"] == axes["width"] == Axis(min=4, opt=6, max=10, multiple=2)
    assert axes["tokens"] == Axis(min=1, opt=12, max=589)
    assert make_axes(source, "1:1:1", None)["height"] == Axis(min=4, opt=8, max=12, multiple=2)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "checkpoint"])
def test_what_is_no_bundle_is_never_replaced(sparse: Path, tmp_path: Path, kind: str, force: bool) -> None:
    out = sparse if kind == "checkpoint" else tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind != "checkpoint":
        out.mkdir()
    if kind == "folder":
        (out / "thesis.txt").write_text("mine")
    before = snapshot(out.parent)
    with pytest.raises(InputError, match="exists and is not a bundle: choose another name"):
        export_quickly("fashion", out, force=force)
    assert snapshot(out.parent) == before


def test_a_bundle_is_replaced_only_by_force(graphless: Path, one_block_sd3: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    export_quickly(one_block_sd3, out, batch="1:1:2")
    before = snapshot(out)
    with pytest.raises(InputError, match=r"is a bundle already: .* --force"):
        export_quickly(one_block_sd3, out)
    assert snapshot(out) == before
    export_quickly(one_block_sd3, out, force=True)
    assert snapshot(out) == snapshot(graphless) != before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_partial_folder_of_somebody_else_is_kept(one_block_sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / "download").write_text("mine")
    with pytest.raises(InputError, match=r"bundle\.partial is in the way and is not from an export"):
        export_quickly(one_block_sd3, tmp_path / "bundle")
    assert (tmp_path / "bundle.partial" / "download").read_text() == "mine"


INTERRUPTED = """
import os, signal, sys
from obsdiff.cli import main
from obsdiff.cli.show import ShownProgress

model, bundle, note, number = sys.argv[1:]
advance = ShownProgress.advance

def stop(self, count=1, text=""):
    if text.startswith(note):
        os.kill(os.getpid(), int(number))
    advance(self, count, text)

ShownProgress.advance = stop
main(["export", model, bundle, "--force"])
"""


@pytest.mark.parametrize(
    ("number", "note", "code"),
    [
        (signal.SIGKILL, "tracing", -signal.SIGKILL),
        (signal.SIGINT, "tracing", 130),
        (signal.SIGTERM, "copying", 130),
    ],
)
def test_interrupted_anywhere_the_old_bundle_is_usable_and_the_next_run_goes_through(
    graphless: Path, one_block_sd3: Path, tmp_path: Path, number: int, note: str, code: int
) -> None:
    bundle = tmp_path / "bundle"
    export_quickly(one_block_sd3, bundle)
    before = snapshot(bundle)
    command = [sys.executable, "-c", INTERRUPTED, str(one_block_sd3), str(bundle), note, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(bundle) == before
    open_bundle(bundle)
    left = {path.name for path in tmp_path.iterdir()} - {"bundle"}
    assert left == ({"bundle.partial"} if number == signal.SIGKILL else set())
    export_quickly(one_block_sd3, bundle, force=True, batch="1:1:2")
    assert open_bundle(bundle).axes["batch"].max == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


FULL_DISK = """
import json, resource, sys
from obsdiff.errors import ObsdiffError
from obsdiff.export.stage import export

model, bundle, *limits = sys.argv[1:]
messages = []
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(model, bundle, force=True)
        messages.append("written")
    except (ObsdiffError, OSError) as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """While components are copied, while the weights are written (larger than any component), while the graph is."""
    from diffusers import SD3Transformer2DModel

    source, model, bundle = find_source("fashion"), tmp_path / "model", tmp_path / "bundle"
    transformer = SD3Transformer2DModel.from_config(
        {**source.config, "num_layers": 1, "num_attention_heads": 16, "caption_projection_dim": 256}
    )
    load_pipeline(source, torch.float32, transformer=transformer).save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps(dict(source.defaults)))
    export_quickly(model, bundle)
    before = snapshot(bundle)
    weights = (bundle / "denoiser" / "model.safetensors").stat().st_size
    limits = [1000, weights - 1, weights + 1]
    command = [sys.executable, "-c", FULL_DISK, str(model), str(bundle), *map(str, limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout.splitlines()[-1])
    assert "written" not in messages
    assert all("File too large" in message or "could not be written" in message for message in messages), messages
    assert all(len(message.splitlines()) == 1 for message in messages)
    assert snapshot(bundle) == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "model"}


def test_progress_reaches_its_total(one_block_sd3: Path, tmp_path: Path) -> None:
    from obsdiff.progress import Progress

    class Counting(Progress):
        done = total = 0

        def start(self, title: str, total: int) -> None:
            self.total += total

        def advance(self, count: int = 1, note: str = "") -> None:
            self.done += count

    progress = Counting()
    export(one_block_sd3, tmp_path / "bundle", formats=(), progress=progress)
    assert progress.done == progress.total > 0
    assert torch.is_grad_enabled()
