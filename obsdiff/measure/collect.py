"""Gathers a report from what the other commands left on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from obsdiff.checkpoint import CheckpointInfo, read_info
from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest, read_manifest
from obsdiff.export.receipt import read_receipt
from obsdiff.measure.report import Latency, Layer, Report, Variant
from obsdiff.measure.reproduce import bench_command, eval_command, export_command, prune_command
from obsdiff.measure.results import EVAL, Bench, Eval, Metric, read_picture, read_result
from obsdiff.measure.variants import Found, find_reference, last_parts, name_variants
from obsdiff.models.source import INFO, MANIFEST
from obsdiff.progress import Progress

PICTURES = 12
TIMED = "Latencies are compared only within one run of bench, which takes its paths in turn."
DRAWN = "Intervals (95 %) say how far a figure would move with other pictures of the same kind."


def collect(
    paths: Sequence[str | Path], *, title: str | None = None, pictures: int = PICTURES, progress: Progress | None = None
) -> Report:
    """A report of pruned checkpoints, bundles, and results of bench and eval, in any order.

    What belongs to one variant is told by name_variants; at most `pictures` prompts are shown, spread over those there
    are. Raises InputError that names the file for one that is damaged, foreign, or cannot be compared with the others.
    """
    found = _read(paths)
    _check_evals(found.evals)
    names = name_variants(found)
    reference = find_reference(found, names)
    order = list(dict.fromkeys(([reference] if reference else []) + list(names.values())))
    prompts, words = _choose_prompts(found.evals, pictures)
    drawn = _pictures(found, names, prompts, progress or Progress())
    variants = [_variant(name, names, found, drawn.get(name, [])) for name in order]
    results: list[Bench | Eval] = [*found.benches.values(), *found.evals.values()]
    settings = next(iter(found.evals.values())).settings if found.evals else None
    return Report(
        title=title or _title(found, order, reference),
        summary=f"Compared with {reference}." if reference else "",
        variants=variants,
        reference=reference,
        prompts=[settings.prompts[k] for k in prompts] if settings else [],
        seeds=[settings.seeds[k] for k in prompts] if settings else [],
        pictures=words,
        gates=[
            gate.model_copy(update={"path": names.get(gate.path, gate.path)})
            for one in found.evals.values()
            for gate in one.gates
        ],
        skipped={name: reason for one in found.evals.values() for name, reason in one.skipped.items()},
        environments=_environments(found),
        commands=[
            ("Time them again" if isinstance(one, Bench) else "Judge their pictures again", _command(one))
            for one in results
        ],
        notes=[note for note, told in ((TIMED, found.benches), (DRAWN, found.evals)) if told],
    )


def _read(paths: Sequence[str | Path]) -> Found:
    found = Found()
    for given in dict.fromkeys(map(str, paths)):
        path = Path(given)
        if path.is_dir() and (path / EVAL).exists():
            path, given = path / EVAL, str(path / EVAL)
        if path.is_file():
            result = read_result(path)
            if isinstance(result, Bench):
                found.benches[given] = result
            else:
                found.evals[given] = result
        elif (path / MANIFEST).exists():
            found.bundles[given] = read_manifest(path)
            found.receipts[given] = read_receipt(path, found.bundles[given])
        elif info := read_info(path):
            found.checkpoints[given] = info
        else:
            state = "has neither of their files" if path.is_dir() else "does not exist"
            raise InputError(
                f"{given} {state}: give pruned checkpoints ({INFO}), bundles ({MANIFEST}), folders of obsdiff eval "
                f"--out ({EVAL}) and files of obsdiff bench --out; a dense model comes in through them"
            )
    if not (found.checkpoints or found.bundles or found.benches or found.evals):
        raise InputError("a report needs at least one path")
    return found


def _check_evals(evals: Mapping[str, Eval]) -> None:
    """Evals can stand on one page when they drew the same and measured each thing once. Raises InputError."""
    files = list(evals)
    for file in files[1:]:
        first, second = evals[files[0]], evals[file]
        if _drawn_as(first) != _drawn_as(second):
            raise InputError(
                f"{files[0]} and {file} cannot be compared: they differ in their prompts, seeds, settings or reference"
            )
    seen: dict[tuple[str, str], str] = {}
    for file, one in evals.items():
        for drawn in one.results:
            for metric in drawn.metrics:
                if (other := seen.setdefault((drawn.path, metric), file)) != file:
                    raise InputError(f"{other} and {file} both have {metric} of {drawn.path}: give one of them")


def _drawn_as(one: Eval) -> tuple[str, dict[str, Any]]:
    """What decides its pictures but the weights: where and how many at once they were drawn is none of it."""
    settings = one.settings.model_dump()
    return last_parts(one.reference.path, 1), {k: v for k, v in settings.items() if k not in ("batch_size", "device")}


def _title(found: Found, order: Sequence[str], reference: str | None) -> str:
    bases = [info.base["name"] for info in found.checkpoints.values()]
    bases += [manifest.base.get("name", "a model") for manifest in found.bundles.values()]
    model = last_parts(bases[0], 1) if bases else reference
    pruned = [name for name in order if name != reference]
    if len(pruned) == 1:
        return f"{pruned[0]}, made of {model}" if model else pruned[0]
    return f"{len(pruned)} variants of {model}" if pruned else str(model)


def _variant(name: str, names: Mapping[str, str], found: Found, images: Sequence[Image.Image]) -> Variant:
    checkpoints = {path: info for path, info in found.checkpoints.items() if names[path] == name}
    bundles = {path: manifest for path, manifest in found.bundles.items() if names[path] == name}
    path, info = next(iter(checkpoints.items()), (None, None))
    bundle, manifest = next(iter(bundles.items()), (None, None))
    metrics: dict[str, Metric] = {}
    for one in found.evals.values():
        for drawn in (one.reference, *one.results):
            if names[drawn.path] == name:
                metrics = {**drawn.metrics, **metrics}
    about = info or manifest
    commands = []
    if about and about.recipe:
        commands.append(prune_command(about.recipe, about.base, path or f"{name}-checkpoint"))
    if manifest and bundle:
        origin = (path or f"{name}-checkpoint") if manifest.recipe else manifest.base.get("name", "MODEL")
        commands.append(export_command(manifest, origin, bundle))
    return Variant(
        name=name,
        note=_note(info, manifest),
        images=images,
        metrics=metrics,
        latency=_latency(name, names, found.benches),
        layers=[Layer(layer.name, layer.error, layer.sparsity) for layer in info.layers if layer.error is not None]
        if info
        else (),
        totals=manifest.totals if manifest else None,
        dense=manifest.dense if manifest else None,
        receipt=found.receipts[bundle] if bundle else None,
        commands=commands,
    )


def _note(info: CheckpointInfo | None, manifest: Manifest | None) -> str:
    """What it was made of and how it was checked, as sentences."""
    said = []
    if about := info or manifest:
        said.append(
            f"Made of {about.base.get('name')} (SHA-256 {about.base.get('sha256', '')[:12]}) "
            f"with obsdiff {about.versions.get('obsdiff', '')}."
        )
    if info:
        entries = sum(a * b for a, b in (layer.shape for layer in info.layers))
        zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in info.layers)
        said.append(f"{len(info.layers)} linears pruned, {zeros / max(1, entries):.1%} of their weights zero.")
    for name, check in manifest.formats.items() if manifest else ():
        error, limit = f"{check.relative_error:.1e}", f"{check.tolerance:.0e}"
        said.append(f"{name} differs from PyTorch by {error}, where {limit} is allowed.")
    return " ".join(said)


def _latency(name: str, names: Mapping[str, str], benches: Mapping[str, Bench]) -> list[Latency]:
    """The variant's rows; a group is named by its batch, and by its file where two have the same."""
    sizes = [bench.settings.get("batch_size", 1) for bench in benches.values()]
    return [
        Latency(
            group=f"batch {size}" + (f", {file}" if sizes.count(size) > 1 else ""),
            backend=row.backend,
            median_ms=row.median_ms,
            p90_ms=row.p90_ms,
            images_per_second=row.images_per_second,
            denoiser_ms=row.stages_ms.get("denoiser_call"),
            memory_bytes=row.peak_memory_bytes,
        )
        for (file, bench), size in zip(benches.items(), sizes, strict=True)
        for row in bench.results
        if names[row.path] == name
    ]


def _choose_prompts(evals: Mapping[str, Eval], count: int) -> tuple[list[int], str]:
    """Which of the prompts are shown, spread over those that there are pictures of, and what the page says of it."""
    sides = [drawn for one in evals.values() for drawn in (one.reference, *one.results) if drawn.images]
    there = min((len(drawn.images) for drawn in sides), default=0)
    shown = sorted({k * there // count for k in range(count)} if there > count else range(there))
    words = f"{len(shown)} of {there} pictures, taken at equal distances." if len(shown) < there else ""
    return shown, words


def _pictures(
    found: Found, names: Mapping[str, str], prompts: Sequence[int], progress: Progress
) -> dict[str, list[Image.Image]]:
    """Each variant's pictures of those prompts; the reference's are those of the first eval."""
    sides = {
        names[drawn.path]: (Path(file), drawn)
        for file, one in reversed(found.evals.items())
        for drawn in (one.reference, *one.results)
        if drawn.images
    }
    with progress.task("reading pictures", max(1, len(sides))):
        drawn: dict[str, list[Image.Image]] = {}
        for name, (file, side) in sides.items():
            progress.advance(1)
            drawn[name] = [read_picture(file.parent, side.images[k], file) for k in prompts]
    return drawn


def _environments(found: Found) -> list[tuple[str, dict[str, str]]]:
    """What was measured where; results of one machine share an entry."""
    entries: list[tuple[list[str], dict[str, str]]] = []
    results: list[tuple[str, Bench | Eval]] = [*found.benches.items(), *found.evals.items()]
    for file, one in results:
        same = next((files for files, environment in entries if environment == one.environment), None)
        if same is None:
            entries.append(([file], one.environment))
        else:
            same.append(file)
    return [(", ".join(files), environment) for files, environment in entries]


def _command(one: Bench | Eval) -> str:
    return bench_command(one) if isinstance(one, Bench) else eval_command(one)
