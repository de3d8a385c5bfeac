"""Quality of one or several paths against a reference: the same prompts, the same noise, figures with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from obsdiff.device import pick_device
from obsdiff.errors import InputError
from obsdiff.files import write_json
from obsdiff.measure import fashion
from obsdiff.measure.comparable import Subject, check_comparable, look
from obsdiff.measure.drawing import DRAWN, Asked, draw_subject
from obsdiff.measure.environment import environment
from obsdiff.measure.metrics import METRICS
from obsdiff.measure.quality import Drawn
from obsdiff.measure.scoring import gate, open_metrics, score
from obsdiff.models.source import DATA
from obsdiff.progress import Progress
from obsdiff.prune.recipe import read_prompts
from obsdiff.runtime.generate import save_png
from obsdiff.runtime.pipeline import check_sides

EVAL = "eval.json"
BATCH = 8
IMAGES = {True: 128, False: 64}  # of the embedded model, whose Fréchet distance needs 128; of others


def evaluate(
    paths: Sequence[str | Path],
    reference: str | Path,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    num_images: int | None = None,
    metrics: Iterable[str] = (),
    weights: Mapping[str, str | Path] | None = None,
    minimum: Mapping[str, float] | None = None,
    maximum: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    backend: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    keep: int = 16,
    progress: Progress | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Draws the same prompts with the same noise on every path and the reference, and measures how they differ.

    `prompts` is a file or the prompts themselves, begun again from the first with other seeds when `num_images` is
    larger; `metrics` are names of METRICS (none: all that fit the model), `weights` their files or folders, `overrides`
    the pipeline's own options, which all paths share. `minimum` and `maximum` are gates: the result says whether each
    was met, and a metric that could not be computed meets none. In the folder `out`: eval.json and the first `keep`
    pictures of every path; interrupted, it goes on with the paths that were drawn.

    Returns `kind`, `environment`, `settings`, `reference` and `results` (for each path `metrics`: value, 95 % interval,
    number of images, which way is better), `skipped` (metric: reason) and `gates`.
    Raises InputError when a path or an option is wrong, when pictures cannot be compared, and when none of the metrics
    that were named can be computed.
    """
    if not paths:
        raise InputError("an eval needs at least one path beside its reference")
    progress, out, weights = progress or Progress(), Path(out) if out else None, dict(weights or {})
    device, overrides = pick_device(device), {name: value for name, value in overrides.items() if value is not None}
    gates = [(name, bound, limit) for bound in (minimum, maximum) for name, limit in (bound or {}).items()]
    _check_names([*metrics, *weights, *(name for name, *_ in gates)])
    if any(not math.isfinite(limit) for *_, limit in gates):
        raise InputError("the limit of a gate must be a finite number")
    _check_folder(out)
    first, *candidates = look([reference, *paths])
    if backend not in ("auto", "torch") and not any(one.is_bundle for one in (first, *candidates)):
        raise InputError(f"--backend {backend}: none of the paths is a bundle, and anything else runs in torch")
    check_sides(first.path, overrides)
    for one in candidates:
        check_comparable(one, first, overrides)
    asked = _ask(first, candidates, prompts, num_images, seed, batch_size, backend, device, overrides)
    named = list(dict.fromkeys(metrics))
    fitting = [name for name, metric in METRICS.items() if metric.of in ("all", _kind(first))]
    wanted = list(dict.fromkeys([*(named or [*fitting, *weights]), *(name for name, *_ in gates)]))
    scorers, skipped = open_metrics(wanted, weights, first, len(asked.prompts), device, overrides)
    _check_any(named, skipped)
    _make_folder(out)

    count = len(asked.prompts)
    with progress.task("drawing", (1 + len(candidates)) * (count + len(scorers))):
        drawn, notes = {}, {}
        for one in (first, *candidates):
            progress.advance(0, f"drawing {one.name}")
            drawn[one.path], notes[one.path] = draw_subject(one, asked, out, progress)
            if not drawn[one.path].latents.isfinite().all():
                progress.message(
                    f"{one.path}: latents are not finite, as when fp16 overflows: no figure of them counts"
                )
        shapes = {tuple(entry.latents.shape[1:]) for entry in drawn.values()}
        if len(shapes) > 1:
            raise InputError(f"the latents differ in shape ({', '.join(map(str, shapes))}): the noise was not the same")
        figures = score(scorers, asked.prompts, first, candidates, drawn, skipped, progress)
    _check_any(named, skipped)
    width, height = drawn[first.path].images[0].size

    def entry(one: Subject) -> dict[str, Any]:
        images = _save(out, keep, one, drawn[one.path], asked)
        told = {"path": one.path, "name": one.name, "backend": notes[one.path]["backend"]}
        return {**told, "metrics": figures[one.path], "images": images}

    result = {
        "kind": "eval",
        "environment": environment(),
        "settings": {
            "prompts": asked.prompts,
            "seeds": list(asked.seeds),
            "steps": notes[first.path]["steps"],
            "guidance_scale": notes[first.path]["guidance_scale"],
            "height": height,
            "width": width,
            "scheduler": first.scheduler["class"],
            "device": device,
            "batch_size": asked.batch_size,
        },
        "reference": entry(first),
        "results": [entry(one) for one in candidates],
        "skipped": skipped,
        "gates": [
            gate(name, bound is minimum, limit, one.path, figures[one.path])
            for name, bound, limit in gates
            for one in candidates
        ],
    }
    if out:
        write_json(out / EVAL, result)
        for file in (out / DRAWN).glob("*.safetensors"):
            file.unlink()
        (out / DRAWN).rmdir()
    return result


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in METRICS:
            raise InputError(f"there is no metric {name}: there are {', '.join(METRICS)}")


def _check_folder(out: Path | None) -> None:
    """Refuses a folder with other things in it, before anything is drawn. Raises InputError."""
    if out and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another name")
    if out and out.is_dir() and any(out.iterdir()) and not ((out / EVAL).exists() or (out / DRAWN).exists()):
        raise InputError(f"{out} has other things in it: choose another name")


def _make_folder(out: Path | None) -> None:
    """The folder and the one for what is drawn: what cannot be written is known before. Raises InputError."""
    try:
        if out:
            (out / DRAWN).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror}") from None


def _check_memory(count: int, subjects: Sequence[Subject], overrides: Mapping[str, Any]) -> None:
    """The pixels of all paths are held until they are compared. Raises InputError for more than this machine has."""
    sides = {axis: subjects[0].side(axis, overrides) for axis in ("height", "width")}
    need, have = 3 * sides["height"] * sides["width"] * count * len(subjects), psutil.virtual_memory().total
    if need > have:
        raise InputError(
            f"{count} images of {sides['width']}×{sides['height']} on {len(subjects)} paths take "
            f"{need / 2**30:.0f} GiB of memory, and this machine has {have / 2**30:.0f}: give a smaller --num-images"
        )


def _check_any(named: Sequence[str], skipped: Mapping[str, str]) -> None:
    if named and all(name in skipped for name in named):
        raise InputError("; ".join(f"{name} cannot be computed: {skipped[name]}" for name in named))


def _kind(subject: Subject) -> str:
    return "embedded" if subject.embedded else "other"


def _ask(
    first: Subject,
    candidates: Sequence[Subject],
    prompts: str | Path | Sequence[str] | None,
    num_images: int | None,
    seed: int,
    batch_size: int | None,
    backend: str,
    device: str,
    overrides: Mapping[str, Any],
) -> Asked:
    """The prompts, as many as images, and settings that every path can keep. Raises InputError."""
    if isinstance(prompts, (str, Path)):
        prompts = read_prompts(Path(prompts))
    count = num_images or (len(prompts) if prompts else IMAGES[first.embedded])
    _check_memory(count, [first, *candidates], overrides)
    if prompts is None and first.source.spec.prompts:
        prompts = first.source.spec.prompts
    elif prompts is None:
        prompts = fashion.unseen_captions(count) if first.embedded else read_prompts(DATA / "prompts" / "general.txt")
    if not prompts or count < 1:
        raise InputError("an eval needs at least one prompt and one image")
    if not 0 <= seed < 2**64 - count:
        raise InputError(f"the seed {seed} is out of range: it must lie between 0 and 2**64 - 1")
    largest = [one.max_batch for one in (first, *candidates) if one.max_batch]
    return Asked(
        list(islice(cycle(prompts), count)),
        range(seed, seed + count),
        {**first.source.defaults, **overrides},
        batch_size or min([BATCH, *largest]),
        backend,
        device,
    )


def _save(out: Path | None, keep: int, one: Subject, drawn: Drawn, asked: Asked) -> list[str]:
    """Writes a path's first pictures; their names relative to the folder."""
    names = []
    if out:
        (out / "images" / one.name).mkdir(parents=True, exist_ok=True)
        for k, image in enumerate(drawn.images[:keep]):
            names.append(f"images/{one.name}/{k:05d}.png")
            about = {"prompt": asked.prompts[k], "seed": asked.seeds[k], "model": one.path}
            save_png(image, out / names[-1], about)
    return names
