"""Which backend is the fastest here: each is checked against torch and timed in turn with it, and the best recorded."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from obsdiff.checkpoint import versions
from obsdiff.device import Device, describe, pick_device
from obsdiff.errors import InputError, ObsdiffError
from obsdiff.export import engines, parity
from obsdiff.export.bundle import Manifest, open_bundle, read_manifest
from obsdiff.export.receipt import Evidence, read_receipt
from obsdiff.export.receipt import require_sparse as gate
from obsdiff.export.schema import Tuned
from obsdiff.files import write_json
from obsdiff.measure.environment import environment
from obsdiff.measure.tune_process import Worker
from obsdiff.models.source import MANIFEST
from obsdiff.progress import Progress
from obsdiff.runtime.backends import BACKENDS, FOREIGN, obstacle, torch_sparse

REFERENCE = "torch"
LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "torch-tensorrt")
Axes = dict[str, int]
Samples = list[list[float]]  # milliseconds by shape and run


def tune(
    bundle: str | Path,
    *,
    batches: Sequence[int] = (),
    sizes: Sequence[str] = (),
    backends: Sequence[str] = (),
    build: bool = True,
    device: str | None = None,
    runs: int = 10,
    timeout: float = 1800,
    require_sparse: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times a denoiser call on every backend of this machine, and records the fastest right one in the bundle.

    Every batch (images) is tried at every size (pixels, "512" or "768x512", width first); the defaults are what the
    bundle was exported for. A backend is right when it agrees with torch in the same precision, at these shapes and
    at those that an export checks. Each runs in a process of its own, in turn with torch's, so that two copies of the
    denoiser are in memory; one that gives no answer for `timeout` seconds is given up. Returns `environment`, `device`,
    `settings`, `shapes`, `chosen` and `backends`: of each the milliseconds of a denoiser call by shape, the speed-up
    over torch and the relative error, or the reason why there are none.
    Raises InputError when an argument is wrong or the bundle cannot be written, ObsdiffError when no backend is right;
    then, and when interrupted, the bundle stays as it was. GateError when all is recorded and less than the share
    `require_sparse` of the 2:4 layers was seen to run on sparse tensor cores.
    """
    progress, bundle, device = progress or Progress(), Path(bundle), pick_device(device)
    if runs < 1 or timeout <= 0:
        raise InputError("tuning takes at least one run, and more than no seconds")
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise InputError(f"--backends {unknown[0]}: there are {', '.join(BACKENDS)}")
    manifest = open_bundle(bundle)
    shapes = tuned_shapes(manifest, batches, sizes)
    _check_writable(bundle)
    asked = [name for name in BACKENDS if name in (backends or BACKENDS)]
    left_out = {
        name: reason
        for name in asked
        if (reason := obstacle(name, manifest, device) or _foreign(name, bundle, manifest, device, backends))
    }
    trial = _Trial(bundle, manifest, device, build, timeout, shapes, runs, progress)
    rows = trial.run([name for name in asked if name not in left_out])
    rows |= {name: {"backend": name, "status": "left out", "reason": reason} for name, reason in left_out.items()}
    ordered = [ROW | rows[name] for name in BACKENDS if name in rows]
    right = [row for row in ordered if row["status"] == "right" and row["backend"] in asked]
    if not right:
        reasons = "; ".join(f"{row['backend']}: {row['reason']}" for row in ordered if row["backend"] in asked)
        raise ObsdiffError(f"no backend to record: {reasons}")
    chosen = max(right, key=lambda row: row["speedup"])["backend"]
    here = describe(device)
    milliseconds = {row["backend"]: row["milliseconds"] for row in ordered if row["status"] == "right"}
    told = torch_sparse.examine(bundle, manifest, device) if "torch-sparse" in milliseconds else None
    _record(bundle, here, shapes, chosen, milliseconds, told)
    if require_sparse is not None and (receipt := read_receipt(bundle, read_manifest(bundle))):
        gate(receipt, require_sparse)
    return {
        "environment": environment(),
        "device": here._asdict(),
        "settings": {"runs": runs, "build": build, "precision": manifest.precision},
        "shapes": [_in_pixels(axes, manifest) for axes in shapes],
        "backends": ordered,
        "chosen": chosen,
    }


ROW: dict[str, Any] = {
    "backend": "",
    "status": "",  # right, failed, left out
    "milliseconds": None,
    "speedups": None,
    "speedup": None,
    "relative_error": None,
    "load_seconds": None,
    "reason": None,
}


class _Trial:
    """What is asked of every backend."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        device: str,
        build: bool,
        timeout: float,
        shapes: list[Axes],
        runs: int,
        progress: Progress,
    ):
        self.request = {"bundle": str(bundle), "device": device, "threads": torch.get_num_threads(), "build": build}
        self.checked = [*shapes, *parity.check_shapes(manifest.axes)]
        self.timeout, self.shapes, self.runs, self.progress = timeout, shapes, runs, progress

    def run(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """A row for torch and for each backend named. Raises ObsdiffError when there is no torch to compare with."""
        others = [name for name in names if name != REFERENCE]
        rows = {}
        own: list[Samples] = []
        with (
            tempfile.TemporaryDirectory() as folder,
            self.progress.task("tuning", (1 + len(others)) * (2 + self.runs)),
            self._worker(REFERENCE, folder) as reference,
        ):
            outputs = str(Path(folder) / "outputs.safetensors")
            try:
                loaded = self._load(reference)
                reference.ask("reference", shapes=self.checked, path=outputs)
                own.append(self._take_turns(reference)[0])
            except ObsdiffError as error:
                raise ObsdiffError(f"torch, which the others are compared with, does not run: {error}") from None
            for name in others:
                with self._worker(name, folder) as worker:
                    try:
                        row, samples = self._compare(worker, reference, outputs)
                        own.append(samples)
                    except ObsdiffError as error:
                        if reference.ended:
                            raise ObsdiffError(f"torch, which the others are compared with, ended: {error}") from None
                        status = "left out" if isinstance(error, InputError) else "failed"
                        row = {"status": status, "reason": str(error)}
                rows[name] = {"backend": name, **row}
        merged = [[time for samples in own for time in samples[k]] for k in range(len(self.shapes))]
        rows[REFERENCE] = {"backend": REFERENCE, "load_seconds": loaded, **_times(merged, merged)}
        return rows

    def _worker(self, name: str, folder: str) -> Worker:
        return Worker({**self.request, "backend": name}, Path(folder) / f"{name}.log", self.timeout, self.progress)

    def _load(self, worker: Worker) -> float:
        self.progress.advance(1, f"{worker.backend}: loading")
        seconds: float = worker.ask("load")
        self.progress.advance(1, f"{worker.backend}: checking")
        return seconds

    def _compare(self, worker: Worker, reference: Worker, outputs: str) -> tuple[dict[str, Any], Samples]:
        """The backend's row, and what torch took beside it."""
        loaded = self._load(worker)
        check = worker.ask("check", shapes=self.checked, path=outputs)
        samples, beside = self._take_turns(worker, reference)
        row = {"load_seconds": loaded, "relative_error": check["relative_error"], **_times(samples, beside)}
        return row, beside

    def _take_turns(self, *workers: Worker) -> list[Samples]:
        """Times the workers in turn, at each shape, after one round that is not counted; the order rotates."""
        found: list[Samples] = [[[] for _ in self.shapes] for _ in workers]
        for run in range(-1, self.runs):
            self.progress.advance(run >= 0, f"{workers[0].backend}: timing")
            for place, axes in enumerate(self.shapes):
                for turn in range(len(workers)):
                    k = (turn + run) % len(workers)
                    milliseconds = workers[k].ask("time", axes=axes)
                    if run >= 0:
                        found[k][place].append(milliseconds)
        return found


def _times(samples: Samples, beside: Samples) -> dict[str, Any]:
    """Medians by shape, and how many times faster than what ran beside it, run by run."""
    speedups = [
        median(theirs / ours for ours, theirs in zip(*pair, strict=True)) for pair in zip(samples, beside, strict=True)
    ]
    return {
        "status": "right",
        "milliseconds": [median(times) for times in samples],
        "speedups": speedups,
        "speedup": geometric_mean(speedups),
    }


def tuned_shapes(manifest: Manifest, batches: Sequence[int] = (), sizes: Sequence[str] = ()) -> list[Axes]:
    """Every batch at every size as axes of a denoiser call, for batches of images and sizes in pixels.

    Raises InputError for what the bundle was not exported for.
    """
    usual: Axes = {
        name: manifest.axes[name].opt for name in ("batch", "height", "width", "tokens") if name in manifest.axes
    }
    if sizes and "height" not in usual:
        raise InputError(f"--size {sizes[0]}: this model draws pictures of one size: leave the option out")
    if batches and "batch" not in usual:
        raise InputError(f"--batch {batches[0]}: this model takes one batch: leave the option out")
    found = []
    calls: list[Axes] = [{"batch": manifest.spec.passes * images} for images in batches] or [{}]
    sides: list[Axes] = [_size(text, manifest) for text in sizes] or [{}]
    for batch in calls:
        for size in sides:
            axes = usual | batch | size
            if odd := [name for name, value in axes.items() if not manifest.axes[name].allows(value)]:
                raise InputError(
                    f"{odd[0]} {axes[odd[0]] * manifest.scale(odd[0])} is outside what the bundle was exported for: "
                    f"{manifest.say_range(odd[0])}"
                )
            found.append(axes)
    return [axes for place, axes in enumerate(found) if axes not in found[:place]]


def _in_pixels(axes: Axes, manifest: Manifest) -> dict[str, Any]:
    """The shape in the user's units beside the denoiser's own: pictures and pixels, where the model has a choice."""
    shape: dict[str, Any] = {"axes": axes}
    if "batch" in axes:
        shape["images"] = axes["batch"] / manifest.spec.passes
    return shape | {name: axes[name] * manifest.vae_scale for name in ("height", "width") if name in axes}


def _size(text: str, manifest: Manifest) -> Axes:
    width, _, height = text.partition("x")
    try:
        sides = {"height": int(height or width), "width": int(width)}
    except ValueError:
        raise InputError(f"--size {text}: write the pixels of a side, such as 512, or WIDTHxHEIGHT") from None
    if odd := [side for side in sides.values() if side < 1 or side % manifest.vae_scale]:
        raise InputError(f"--size {text}: {odd[0]} is no multiple of {manifest.vae_scale} pixels")
    return {name: side // manifest.vae_scale for name, side in sides.items()}


def _foreign(name: str, bundle: Path, manifest: Manifest, device: str, named: Sequence[str]) -> str:
    """Why a backend that was not named is left out, though its engine fits: it runs somebody else's code."""
    if name not in engines.FORMATS or name in named:
        return ""
    try:
        found = engines.find_engine(name, bundle, manifest, device)
    except ObsdiffError:  # the process that tries it will say so
        return ""
    if isinstance(found, str) or not engines.runs_code(found[0]) or engines.was_built_here(found[1]):
        return ""
    return f"{FOREIGN}: --backends {name} runs it all the same"


def _check_writable(bundle: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=bundle, prefix=".tune-"):
            pass
    except OSError as error:
        raise InputError(
            f"{bundle} cannot be written, and the result is recorded there: {os.strerror(error.errno or 0)}"
        ) from None


def _record(
    bundle: Path,
    here: Device,
    shapes: list[Axes],
    chosen: str,
    milliseconds: dict[str, list[float]],
    told: Evidence | None,
) -> None:
    """Puts the result into the manifest in the place of this device's last one."""
    libraries = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            libraries[name] = version(name)
    record = Tuned(
        **here._asdict(),
        threads=torch.get_num_threads(),
        shapes=shapes,
        backend=chosen,
        milliseconds=milliseconds,
        versions=versions() | libraries,
        evidence=told.model_dump(mode="json") if told else None,
    )
    manifest = read_manifest(bundle)  # as it is now: another machine may have tuned its own meanwhile
    others = [other for other in manifest.tuned if (other.kind, other.name, other.target) != here]
    tuned = manifest.model_copy(update={"tuned": [*others, record]})
    write_json(bundle / MANIFEST, tuned.model_dump(mode="json"))
