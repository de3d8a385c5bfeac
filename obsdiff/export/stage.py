"""The export stage: shrink, trace, check, and write a bundle or nothing."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor, nn

from obsdiff import checkpoint
from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.export import bundle as bundles
from obsdiff.export import engines, onnx, parity
from obsdiff.export.bundle import Axis, Engine, EngineFormat, EngineOptions, Manifest, Precision
from obsdiff.export.probe import probe
from obsdiff.export.totals import count_nonzero, count_totals, default_axes
from obsdiff.files import copy_files, folder_hash, read_json, write_json, write_tensors
from obsdiff.models import Input, size_of
from obsdiff.models.shrink import shrink
from obsdiff.models.source import INFO, MANIFEST, Source, find_source, load_denoiser, quiet_libraries
from obsdiff.progress import Progress

FORMATS = ("onnx", *get_args(EngineFormat))
MARK = ".obsdiff-export"  # says that a .partial folder is ours to remove


def export(
    model: str | Path,
    bundle: str | Path,
    *,
    formats: Sequence[str] = ("onnx",),
    precision: Precision = "fp32",
    batch: str = "1:1:8",
    size: str | None = None,
    options: EngineOptions | None = None,
    device: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compiles a dense or pruned diffusers pipeline into a bundle, and proves that it computes the same.

    `batch` counts images (a denoiser call with guidance takes twice that in many families), `size` pixels of a side,
    both MIN:OPT:MAX; the size defaults to half, once and one and a half times the model's own. Engines are built with
    `options` for the `device` (cuda where there is one), or for the GPUs that the options name. `force` replaces a
    bundle that is there.
    Raises InputError when an argument is wrong; ObsdiffError when the result disagrees with PyTorch, and then
    nothing is written.
    """
    progress = progress or Progress()
    out = Path(bundle)
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"--format {unknown[0]}: there are {', '.join(FORMATS)}")
    if precision not in parity.DTYPES:
        raise InputError(f"--precision {precision}: there are {', '.join(parity.DTYPES)}")
    graph = bool({"onnx", *engines.NEED_GRAPH} & set(formats))
    compiled = [name for name in dict.fromkeys(formats) if name != "onnx"]
    device = pick_device(device)
    if precision == "bf16" and graph:
        raise InputError("--precision bf16: ONNX Runtime has no bf16 kernels for CPUs, so the graph cannot be checked")
    source = find_source(model)
    if variant := source.pipeline_variant:
        progress.message(f"{source.name}: the weights used are those of the variant {variant}, there are no plain ones")
    if not source.spec.inputs:
        source = probe(source)
    axes = make_axes(source, batch, size)
    work = _claim(out, force)
    try:
        with progress.task("loading", 3 + 2 * (graph + len(compiled))), quiet_libraries():
            manifest, expected = _build(source, work, graph, precision, axes, progress)
            for name in compiled:
                manifest = _compile(name, work, manifest, options or EngineOptions(), device, expected, progress)
            write_json(work / MANIFEST, manifest.model_dump(mode="json"))
        (work / MARK).unlink()
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def make_axes(source: Source, batch: str, size: str | None) -> dict[str, Axis]:
    """The dynamic axes of the graph, in latents and denoiser calls, from the user's images and pixels."""
    names = source.spec.axes(source.config)
    if size and "height" not in names:
        raise InputError(f"--size {size}: this model draws pictures of one size: leave the option out")
    patch = size_of(source.spec.patch, source.config)
    step = source.side_step
    own = default_axes(source)["height"] * source.vae_scale
    low, opt, high = (
        _triple("--size", size)
        if size
        else (
            max(step, own // 2 // step * step),
            own,
            own * 3 // 2 // step * step,
        )
    )
    if any(side % step for side in (low, opt, high)):
        raise InputError(f"--size {size}: sides must be multiples of {step} pixels for this model")
    side = Axis(min=low // source.vae_scale, opt=opt // source.vae_scale, max=high // source.vae_scale, multiple=patch)
    low, opt, high = _triple("--batch", batch)
    passes, (shortest, _usual, longest) = source.spec.passes, source.spec.tokens
    axes = {
        "batch": Axis(min=low, opt=passes * opt, max=passes * high),
        "height": side,
        "width": side,
        "tokens": Axis(min=shortest, opt=source.prompt_tokens, max=longest),
        "image": Axis(min=(side.min // patch) ** 2, opt=(side.opt // patch) ** 2, max=(side.max // patch) ** 2),
    }
    return {name: axes[name] for name in names}


def _triple(option: str, text: str) -> tuple[int, int, int]:
    try:
        low, opt, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"{option} {text}: write MIN:OPT:MAX, for example 1:1:8") from None
    if not 1 <= low <= opt <= high:
        raise InputError(f"{option} {text}: needs 1 <= MIN <= OPT <= MAX")
    return low, opt, high


def _claim(out: Path, force: bool) -> Path:
    """An empty folder beside `out` to work in, or an error that says what stands in the way."""
    if out.exists() and not (out / MANIFEST).exists():
        raise InputError(f"{out} exists and is not a bundle: choose another name")
    if out.exists() and not force:
        raise InputError(f"{out} is a bundle already: choose another name, or pass --force to replace it")
    work = out.with_name(f"{out.name}.partial")
    if work.exists() and not (work / MARK).exists():
        raise InputError(f"{work} is in the way and is not from an export: remove it")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARK).touch()
    return work


def _build(
    source: Source, work: Path, graph: bool, precision: Precision, axes: Mapping[str, Axis], progress: Progress
) -> tuple[Manifest, list[Tensor]]:
    """The bundle without engines in `work`, and what its denoiser gives at the shapes that are checked."""
    spec, config = source.spec, source.config
    info = checkpoint.read_info(source.path)
    if info:
        checkpoint.verify(source, info)
    denoiser = load_denoiser(source, torch.float32)
    progress.advance(1, "shrinking")
    shrink(denoiser, spec, info.groups if info else [])
    shapes = parity.check_shapes(axes)
    expected = parity.reference_outputs(denoiser, spec, config, shapes)
    denoiser.to(parity.DTYPES[precision])
    progress.advance(1, "copying components")
    copy_files(source.path, work, skip=(spec.component, INFO, checkpoint.MASKS))
    (work / bundles.CONFIG).parent.mkdir()
    write_json(work / bundles.CONFIG, dict(config))
    write_tensors(work / bundles.WEIGHTS, {k: v.contiguous() for k, v in denoiser.state_dict().items()})
    checks = {}
    if graph:
        progress.advance(1, "tracing to onnx")
        onnx.export_onnx(denoiser, spec, config, axes, work / bundles.GRAPH)
        progress.advance(1, "checking onnx")
        checks["onnx"] = onnx.check_onnx(expected, spec, config, shapes, work / bundles.GRAPH, precision)
    progress.advance(1, "hashing")
    return _manifest(source, info, denoiser, axes, precision, checks, work), expected


def _compile(
    name: str,
    work: Path,
    manifest: Manifest,
    options: EngineOptions,
    device: str,
    expected: Sequence[Tensor],
    progress: Progress,
) -> Manifest:
    """The manifest with one more engine, which was built in `work` and, where this machine can run it, checked."""
    form = engines.load_format(name)
    key = form.make_key(manifest, options, device)
    path = work / bundles.ENGINES / key.file
    path.parent.mkdir(exist_ok=True)
    progress.advance(1, f"building {name} for {key.target}")
    start = perf_counter()
    form.build(work, manifest, key, path, progress)
    seconds = perf_counter() - start
    check = None
    if reason := form.misfit(key, device):
        progress.message(f"the {name} engine for {key.target} was built and not run: {reason}")
    else:
        progress.advance(1, f"checking {name}")
        denoise = form.open_engine(path, manifest, key, device)
        config, shapes = read_json(work / bundles.CONFIG), parity.check_shapes(manifest.axes)
        check = parity.compare(
            denoise, expected, manifest.spec, config, shapes, manifest.precision, name=f"{name} engine", device=device
        )
    engines.mark_built(path)
    engine = Engine(key=key, seconds=seconds, check=check)
    files = manifest.files | bundles.list_files(work, engine.path)
    return manifest.model_copy(update={"engines": [*manifest.engines, engine], "files": files})


def _manifest(
    source: Source,
    info: checkpoint.CheckpointInfo | None,
    denoiser: nn.Module,
    axes: Mapping[str, Axis],
    precision: Precision,
    checks: Mapping[str, bundles.Check],
    work: Path,
) -> Manifest:
    spec = source.spec
    dtype = str(parity.DTYPES[precision]).removeprefix("torch.")
    groups = info.groups if info else []
    default, itemsize = default_axes(source), parity.DTYPES[precision].itemsize

    def signature(entry: Input) -> bundles.Tensor:
        shape = tuple(axis if axis in axes else size_of(axis, source.config) for axis in entry.axes)
        return bundles.Tensor.model_validate({"name": entry.name, "dtype": entry.dtype or dtype, "axes": shape})

    return Manifest(
        pipeline=source.index["_class_name"],
        denoiser=spec.denoiser,
        component=spec.component,
        components=[name for name in source.index if not name.startswith("_") and name != spec.component],
        base=info.base if info else {"name": source.name, "sha256": folder_hash(source.path)},
        recipe=info.recipe if info else None,
        versions=checkpoint.versions() | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")},
        precision=precision,
        groups=groups,
        axes=dict(axes),
        inputs=[signature(entry) for entry in spec.graph_inputs(source.config)],
        outputs=[signature(spec.output)],
        vae_scale=source.vae_scale,
        formats=dict(checks),
        dense=count_totals(source, [], default, itemsize),
        totals=count_totals(source, groups, default, itemsize, count_nonzero(denoiser.state_dict())),
        files=bundles.list_files(work),
    )
