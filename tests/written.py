"""What other commands would have left on disk, written by hand: recipes, manifests, results, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from obsdiff.checkpoint import CheckpointInfo, LayerRecord
from obsdiff.export.bundle import Manifest
from obsdiff.export.receipt import Layer, Receipt, Summary
from obsdiff.export.schema import Axis, Check, Tensor, Totals
from obsdiff.files import read_json
from obsdiff.measure.results import Bench
from obsdiff.models import FAMILIES, size_of
from obsdiff.models.source import DATA

BASE = {"name": "fashion", "sha256": "0" * 64}
RECIPE: dict[str, Any] = {
    "pattern": "2:4",
    "solver": "auto",
    "prompts": ["a red bag", "a blue coat"],
    "steps": 8,
    "blocks": ":",
    "device": "cpu",
    "dtype": "float32",
}
PROMPTS = ("a red bag", "a blue coat", "a teal shirt")


def checkpoint(path: Path, recipe: Mapping[str, Any] = RECIPE, errors: Sequence[float | None] = (0.1, 0.2)) -> Path:
    """A pruned checkpoint's obsdiff.json, without its weights."""
    return write(path / "obsdiff.json", make_info(recipe, errors).model_dump(mode="json")).parent


def make_info(recipe: Mapping[str, Any] = RECIPE, errors: Sequence[float | None] = (0.1, 0.2)) -> CheckpointInfo:
    layers = [
        LayerRecord(name=f"transformer_blocks.{k}.attn.to_q", shape=(8, 8), sparsity=0.5, error=error)
        for k, error in enumerate(errors)
    ]
    return CheckpointInfo(
        base=BASE, versions={"obsdiff": "0.1.0"}, threads=1, recipe=dict(recipe), layers=layers, groups=[]
    )


def bundle(path: Path, recipe: Mapping[str, Any] | None = RECIPE, macs: int = 50, base: Any = BASE) -> Path:
    """A bundle's manifest.json, without its files."""
    spec = FAMILIES["SD3Transformer2DModel"]
    config = read_json(DATA / "fashion" / "transformer" / "config.json")
    ranges = {"batch": (1, 2, 16), "height": (4, 8, 12), "width": (4, 8, 12), "tokens": (1, 12, 589)}
    axes = {name: Axis(min=low, opt=opt, max=high) for name, (low, opt, high) in ranges.items()}

    def signature(entry: Any) -> Tensor:
        shape = tuple(axis if axis in axes else size_of(axis, config) for axis in entry.axes)
        return Tensor(name=entry.name, dtype=entry.dtype or "float32", axes=shape)

    manifest = Manifest(
        pipeline="StableDiffusion3Pipeline",
        denoiser=spec.denoiser,
        component=spec.component,
        components=[],
        base=base,
        recipe=None if recipe is None else dict(recipe),
        versions={"obsdiff": "0.1.0"},
        precision="fp16",
        groups=[],
        axes=axes,
        inputs=[signature(entry) for entry in spec.graph_inputs(config)],
        outputs=[signature(spec.output)],
        vae_scale=4,
        formats={"onnx": Check(shapes=[], max_difference=1e-6, relative_error=3e-7, tolerance=1e-4)},
        dense=Totals(parameters=100, nonzero=100, bytes=200, macs=100),
        totals=Totals(parameters=100, nonzero=60, bytes=200, macs=macs),
        files={},
    )
    return write(path / "manifest.json", manifest.model_dump(mode="json")).parent


def receipt(path: Path, **summary: Any) -> Path:
    """A receipt of two layers, one of them sparse, into a bundle."""
    written = write(path / "receipt.json", make_receipt(**summary).model_dump(mode="json"))
    manifest = read_json(path / "manifest.json")
    write(path / "manifest.json", {**manifest, "files": {"receipt.json": {"bytes": 1, "sha256": "0" * 64}}})
    return written


def make_receipt(reason: str = "its width <8>", **summary: Any) -> Receipt:
    layer = {"shape": (64, 32), "rows": 9, "macs_share": 0.4, "dtype": "fp16", "nm_valid": True}
    layers = (
        Layer(name="to_q", eligible=True, kernel="sparse", dense_ms=0.3, sparse_ms=0.2, **layer),
        Layer(name="to_k", eligible=False, kernel="dense", reason=reason, **layer),
    )
    told = {"layers": 2, "valid": 2, "eligible": 1, "eligible_macs": 0.4, "sparse": 1, "gemm_share": 0.7}
    return Receipt(layers=layers, summary=Summary(**{**told, "limit": 1.4, "reached": 1.2, **summary}))


def bench(path: Path, medians: Mapping[str, float], backend: str = "onnxruntime", **settings: Any) -> Path:
    """A result of bench, as `bench --json` prints it: without a kind."""
    return write(path, make_bench(medians, backend, **settings).model_dump(exclude={"kind"}))


def make_bench(medians: Mapping[str, float], backend: str = "onnxruntime", **settings: Any) -> Bench:
    rows = [
        {
            "path": name,
            "backend": backend,
            "median_ms": ms,
            "p90_ms": ms * 1.1,
            "stages_ms": {"denoiser_call": ms / 8},
            "images_per_second": 1000 / ms,
            "peak_memory_bytes": 500_000_000,
        }
        for name, ms in medians.items()
    ]
    settings = {"batch_size": 1, "runs": 5, "num_inference_steps": 8, **settings}
    return Bench(environment={"processor": "a fast one"}, settings=settings, results=rows)


def evaluation(
    folder: Path, errors: Mapping[str, float | None], reference: str = "dense", size: int = 8, **changes: Any
) -> Path:
    """A folder of eval: latent_mse of each path, and pictures of one colour a path."""

    def side(path: str, k: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        name = Path(path).name
        images = [f"images/{name}/{i:05}.png" for i in range(len(PROMPTS))]
        for i, image in enumerate(images):
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (40 * k, 60 * i, 0)).save(folder / image)
        return {"path": path, "name": name, "backend": "torch", "metrics": metrics, "images": images}

    found = {
        path: {"latent_mse": {"value": value, "low": 0.01, "high": 0.3, "images": 3, "better": "lower"}}
        for path, value in errors.items()
    }
    settings = {"prompts": list(PROMPTS), "seeds": [5, 6, 7], "steps": 8, "guidance_scale": 4.0}
    value = {
        "kind": "eval",
        "environment": {"processor": "a fast one"},
        "settings": {**settings, "scheduler": "Euler"},
        "reference": side(reference, 0, {}),
        "results": [side(path, k, metrics) for k, (path, metrics) in enumerate(found.items(), 1)],
        "skipped": {"fid": "3 pictures are too few"},
        "gates": [{"metric": "latent_mse", "path": path, "limit": 0.1, "value": 0.05, "met": True} for path in errors],
    }
    write(folder / "eval.json", {**value, **changes})
    return folder


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
