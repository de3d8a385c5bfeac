"""What a checkpoint or bundle holds, verified and counted."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff import checkpoint
from obsdiff.export.bundle import WEIGHTS, open_bundle
from obsdiff.export.receipt import read_receipt, say
from obsdiff.export.schema import Engine, Tuned
from obsdiff.export.totals import count_nonzero, count_totals, default_axes
from obsdiff.models import walk
from obsdiff.models.source import MANIFEST, Source, find_source, meta_denoiser
from obsdiff.prune.solvers.patterns import NM, is_nm

PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8))


def inspect(path: str | Path) -> dict[str, Any]:
    """What `obsdiff inspect` prints: `about`, `totals` as [dense, here] pairs, and a row for each pruned layer.

    Of a bundle also the `receipt`, with the `sentence` that sums it up, or None; of a checkpoint the `gemms` that were
    timed to choose its layers (obsdiff.gemm_times), or None.

    Raises InputError when the path is no model, checkpoint or bundle, or does not agree with its own records.
    """
    if (Path(path) / MANIFEST).exists():
        return _inspect_bundle(Path(path))
    return _inspect_source(find_source(path))


def _inspect_source(source: Source) -> dict[str, Any]:
    info = checkpoint.read_info(source.path)
    stored = checkpoint.denoiser_weights(source.denoiser_path)
    masks = {}
    if info:
        checkpoint.verify(source, info)
        masks = checkpoint.read_masks(source.path, info)
    size = sum(file.stat().st_size for file in stored.files)
    axes, groups = default_axes(source), info.groups if info else []
    dense = count_totals(source, [], axes, 1)
    here = count_totals(source, groups, axes, 1)
    denoiser = meta_denoiser(source)
    units = {
        name: f"{len(record.kept)} of {record.of} {record.kind}"
        for record in groups
        for name in walk.kept_entries(denoiser, source.spec, [record])
    }
    kept = walk.kept_entries(denoiser, source.spec, groups)

    def left(name: str) -> Tensor:
        """The mask without the rows and columns that an export removes."""
        rows, columns = kept.get(name) or map(torch.arange, masks[name].shape)
        return masks[name][rows][:, columns]

    about: dict[str, Any] = {
        "kind": "pruned checkpoint" if info else "dense model",
        "pipeline": source.index["_class_name"],
        "denoiser": source.spec.denoiser,
        "weights": _say_weights(source, stored),
    }
    if info:
        about |= {
            "base": info.base["name"],
            "pattern": info.recipe["pattern"],
            "solver": info.recipe["solver"],
            "calibration": f"{len(info.recipe['prompts'])} prompts, {info.recipe['steps']} steps",
            **_say_left(info.recipe),
            "after export": "heads and neurons that were pruned are gone" if groups else "same shapes, with zeros",
        }
    return {
        "about": about,
        "totals": {
            "parameters": [dense.parameters, here.parameters],
            "nonzero": [dense.parameters, count_nonzero(stored)],
            "macs": [dense.macs, here.macs],
            "bytes": [size, size],
        },
        "gemms": info.recipe.get("gemm_table") if info else None,
        "layers": [
            {
                **layer.model_dump(),
                "nm": next((str(nm) for nm in PATTERNS if is_nm(left(layer.name), nm)), None),
                "units": units.get(layer.name),
            }
            for layer in (info.layers if info else [])
        ],
    }


def _say_left(recipe: dict[str, Any]) -> dict[str, str]:
    """How many layers --only-faster left dense, and where they were timed."""
    left, table = recipe.get("left_dense"), recipe.get("gemm_table")
    return {"left dense": f"{len(left)} layers: no faster on {table['device']}"} if left and table else {}


def _say_weights(source: Source, stored: checkpoint.TensorFiles) -> str:
    """The dtypes that are stored, and which variant's they are when there are no plain ones."""
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}))
    return f"{dtypes} (variant {source.variant})" if source.variant else dtypes


def _inspect_bundle(bundle: Path) -> dict[str, Any]:
    manifest = open_bundle(bundle)
    dense, here = manifest.dense, manifest.totals
    recipe, receipt = manifest.recipe or {}, read_receipt(bundle, manifest)
    axes = {name: manifest.say_range(name) for name in manifest.axes}
    checks = {f"{name} against PyTorch": f"{check.relative_error:.1e}" for name, check in manifest.formats.items()}
    graphs = {f"{name} (onnx)": graph.check for name, graph in manifest.graphs.items()}
    checks |= {f"{name} against PyTorch": f"{check.relative_error:.1e}" for name, check in graphs.items()}
    return {
        "about": {
            "kind": "bundle",
            "pipeline": manifest.pipeline,
            "denoiser": manifest.denoiser,
            "base": manifest.base["name"],
            "pattern": recipe.get("pattern", "dense"),
            "precision": manifest.precision,
            **checks,
            **{f"{engine.key.format} engine": _say_engine(engine) for engine in manifest.engines},
            **{f"tuned on {record.name}": _say_tuned(record) for record in manifest.tuned},
            **axes,
            "files": len(manifest.files),
            "bytes of all files": sum(file.bytes for file in manifest.files.values()),
        },
        "totals": {
            "parameters": [dense.parameters, here.parameters],
            "nonzero": [dense.parameters, here.nonzero],
            "macs": [dense.macs, here.macs],
            "bytes": [dense.bytes, manifest.files[WEIGHTS].bytes],
        },
        "layers": [],
        "groups": [record.model_dump() for record in manifest.groups],
        "receipt": {"sentence": say(receipt.summary), **receipt.model_dump(mode="json")} if receipt else None,
    }


def _say_engine(engine: Engine) -> str:
    told = f"relative error {engine.check.relative_error:.1e}" if engine.check else "not run where it was built"
    return f"for {engine.key.target}, {told}"


def _say_tuned(record: Tuned) -> str:
    """The backend that was chosen and its times, beside torch's."""
    own, torch_own = (record.milliseconds.get(name, []) for name in (record.backend, "torch"))
    times = ", ".join(f"{one:.3g} ms ({other / one:.2f} × torch)" for one, other in zip(own, torch_own, strict=False))
    return f"{record.backend}: {times}" if times else record.backend
