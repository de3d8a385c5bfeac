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
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import bundle as bundles
from obsdiff.export import engines, evidence, onnx, parity, schema
from obsdiff.export import receipt as receipts
from obsdiff.export.bundle import Manifest
from obsdiff.export.components import choose, export_components
from obsdiff.export.probe import probe
from obsdiff.export.ranges import make_axes
from obsdiff.export.schema import Axis, Engine, EngineFormat, EngineOptions, Precision
from obsdiff.export.totals import count_nonzero, count_totals, default_axes
from obsdiff.files import copy_files, folder_hash, read_json, write_json, write_tensors
from obsdiff.models import Input, ModelSpec, size_of
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
    components: Sequence[str] = ("denoiser",),
    precision: Precision = "fp32",
    batch: str = "1:1:8",
    size: str | None = None,
    options: EngineOptions | None = None,
    timing_cache: str | Path | None = None,
    device: str | None = None,
    profile: bool = False,
    require_sparse: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compiles a dense or pruned diffusers pipeline into a bundle, and proves that it computes the same.

    `components` names what gets a graph: `vae` (its decoder) and `text_encoders` beside the denoiser.
    `batch` counts images (a denoiser call with guidance takes twice that in many families), `size` pixels of a side,
    both MIN:OPT:MAX; the size defaults to half, once and one and a half times the model's own. Engines are built with
    `options` for the `device` (cuda where there is one), or for the GPUs that the options name; TensorRT keeps its
    kernel timings in `timing_cache`. With `profile` it builds a second engine without sparse kernels too and times both
    layer by layer for the receipt. `force` replaces a bundle that is there.
    Raises InputError when an argument is wrong; ObsdiffError when the result disagrees with PyTorch, and then
    nothing is written; GateError when the bundle is written and fewer of its 2:4 layers than the share
    `require_sparse` were seen to run on sparse tensor cores.
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
    options = options or EngineOptions()
    engines.check_options(compiled, options, device, precision)
    if timing_cache:
        _check_timing_cache(Path(timing_cache), compiled)
    if profile and "tensorrt" not in compiled:
        raise InputError("--profile is for --format tensorrt: no other engine tells how long its layers take")
    source = find_source(model)
    if variant := source.pipeline_variant:
        progress.message(f"{source.name}: the weights used are those of the variant {variant}, there are no plain ones")
    if not source.spec.inputs:
        source = probe(source)
    names = choose(source, components)
    axes = make_axes(source, batch, size)
    work = _claim(out, force)
    try:
        with progress.task("loading", 3 + 2 * (graph + len(compiled)) + bool(names) + len(names)), quiet_libraries():
            manifest, expected = _build(source, work, graph, names, precision, axes, progress)
            for name in compiled:
                own = engines.heeded(name, options)
                manifest = _compile(
                    name, work, manifest, own, device, source.spec, expected, progress, timing_cache, profile
                )
            manifest, receipt = _complete_receipt(work, manifest)
            write_json(work / MANIFEST, manifest.model_dump(mode="json"))
        (work / MARK).unlink()
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if require_sparse is not None:
        receipts.require_sparse(receipt, require_sparse)
    return manifest


def _check_timing_cache(path: Path, formats: Sequence[str]) -> None:
    if "tensorrt" not in formats:
        raise InputError("--timing-cache is for --format tensorrt: the others time no kernels when they build")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--timing-cache {path}: it must be a file, in a folder that exists")


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
    source: Source,
    work: Path,
    graph: bool,
    components: Sequence[str],
    precision: Precision,
    axes: Mapping[str, Axis],
    progress: Progress,
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
    progress.advance(1, "copying components")
    copy_files(source.path, work, skip=(spec.component, INFO, checkpoint.MASKS))
    graphs = export_components(source, denoiser, components, axes, precision, work, progress) if components else {}
    denoiser.to(parity.DTYPES[precision])
    (work / bundles.CONFIG).parent.mkdir()
    write_json(work / bundles.CONFIG, dict(config))
    write_tensors(work / bundles.WEIGHTS, {k: v.contiguous() for k, v in denoiser.state_dict().items()})
    checks = {}
    if graph:
        progress.advance(1, "tracing to onnx")
        onnx.export_onnx(denoiser, spec, config, axes, work / bundles.GRAPH)
        progress.advance(1, "checking onnx")
        try:
            checks["onnx"] = onnx.check_onnx(expected, spec, config, shapes, work / bundles.GRAPH, precision)
        except parity.NotFiniteError as error:
            first = parity.find_overflow(denoiser, spec, config, shapes, error.seed)
            where = "no module's output passes fp16's largest number, so it happens inside of one"
            where = f"the first module to pass fp16's largest number is {first}" if first else where
            raise ObsdiffError(f"{error}; {where}" if precision == "fp16" else str(error)) from None
    progress.advance(0, "writing the receipt")
    groups, path = info.groups if info else [], work / bundles.GRAPH if graph else None
    receipt = receipts.make_receipt(source, groups, denoiser, axes, precision, path)
    write_json(work / bundles.RECEIPT, receipt.model_dump(mode="json"))
    progress.advance(1, "hashing")
    return _manifest(source, info, denoiser, axes, precision, checks, graphs, work), expected


def _compile(
    name: str,
    work: Path,
    manifest: Manifest,
    options: EngineOptions,
    device: str,
    spec: ModelSpec,  # the manifest leaves out how inputs are drawn
    expected: Sequence[Tensor],
    progress: Progress,
    timing_cache: str | Path | None,
    profile: bool,
) -> Manifest:
    """The manifest with one more engine, which was built in `work` and, where this machine can run it, checked."""
    form = engines.load_format(name)
    key = form.make_key(manifest, options, device)
    path = work / schema.ENGINES / key.file
    path.parent.mkdir(exist_ok=True)
    progress.advance(1, f"building {name} for {key.target}")
    start = perf_counter()
    timings = {"timing_cache": Path(timing_cache)} if timing_cache and name == "tensorrt" else {}
    form.build(work, manifest, key, path, progress, **timings)
    seconds = perf_counter() - start
    check = None
    if reason := form.misfit(key, device):
        progress.message(f"the {name} engine for {key.target} was built and not run: {reason}")
    else:
        progress.advance(1, f"checking {name}")
        denoise = form.open_engine(path, manifest, key, device, work)
        config, shapes = read_json(work / bundles.CONFIG), parity.check_shapes(manifest.axes)
        check = parity.compare(
            denoise, expected, spec, config, shapes, manifest.precision, name=f"{name} engine", device=device
        )
        if profile and name == "tensorrt":
            from obsdiff.export import trt_profile

            progress.advance(0, "timing it layer by layer, with and without sparse kernels")
            trt_profile.profile(work, manifest, key, device, path, progress)
    engines.mark_built(path)
    engine = Engine(key=key, seconds=seconds, check=check)
    told = [name for name in evidence.files_of(engine) if (work / name).exists()]
    files = manifest.files | bundles.list_files(work, engine.path, *told)
    return manifest.model_copy(update={"engines": [*manifest.engines, engine], "files": files})


def _complete_receipt(work: Path, manifest: Manifest) -> tuple[Manifest, receipts.Receipt]:
    """The receipt with what the bundle's engines tell, and the manifest that lists it."""
    receipt = receipts.read_receipt(work, manifest)
    assert receipt
    if found := evidence.bundle_evidence(work, manifest, receipt):
        receipt = receipts.merge(receipt, found)
        write_json(work / bundles.RECEIPT, receipt.model_dump(mode="json"))
        files = manifest.files | bundles.list_files(work, bundles.RECEIPT)
        manifest = manifest.model_copy(update={"files": files})
    return manifest, receipt


def _manifest(
    source: Source,
    info: checkpoint.CheckpointInfo | None,
    denoiser: nn.Module,
    axes: Mapping[str, Axis],
    precision: Precision,
    checks: Mapping[str, schema.Check],
    graphs: Mapping[str, schema.Graph],
    work: Path,
) -> Manifest:
    spec = source.spec
    dtype = str(parity.DTYPES[precision]).removeprefix("torch.")
    groups = info.groups if info else []
    default, itemsize = default_axes(source), parity.DTYPES[precision].itemsize

    def signature(entry: Input) -> schema.Tensor:
        shape = tuple(axis if axis in axes else size_of(axis, source.config) for axis in entry.axes)
        return schema.Tensor.model_validate({"name": entry.name, "dtype": entry.dtype or dtype, "axes": shape})

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
        graphs=dict(graphs),
        dense=count_totals(source, [], default, itemsize),
        totals=count_totals(source, groups, default, itemsize, count_nonzero(denoiser.state_dict())),
        files=bundles.list_files(work),
    )
