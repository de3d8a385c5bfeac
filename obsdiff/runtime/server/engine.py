"""The worker's half: a pipeline that draws batches, reports its steps, and lets cancelled pictures go between them."""

import contextlib
import inspect
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.hooks import after_steps
from obsdiff.models import pipeline_spec
from obsdiff.models.source import MANIFEST
from obsdiff.runtime.generate import call_options, generate, identity
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.server.logs import LoggedProgress
from obsdiff.runtime.server.messages import Info, Key, Settings, Side

PROMPTS = ("a red ankle boot", "a photo of a small blue bag with two long handles")
PROBE_STEPS = 3  # enough for what a scheduler of second order remembers; some pipelines take one for a special case
KNOWN = 256  # sets of options that are kept
PREVIEW_LATENTS = 32  # along a preview's longer side: it must cost little beside a step


class Stopped(Exception):
    """Every picture of the batch was cancelled."""


@dataclass
class Watch:
    """What a batch in progress tells and asks: `step(done, total, latents)` after each step, `gone()` before the next.

    `latents` gives the predicted pictures' latents by index, where the pipeline shows them.
    """

    gone: Callable[[], set[int]] = set
    step: Callable[[int, int, Callable[[], dict[int, Tensor]]], None] = lambda *_: None
    seconds: list[float] = field(default_factory=list)
    dropped: int = 0


class Engine:
    """A loaded and verified bundle (or model) that draws. Raises InputError as obsdiff.load does."""

    def __init__(self, settings: Settings):
        folder = Path(settings.path)
        self.manifest = open_bundle(folder) if (folder / MANIFEST).exists() else None
        self.path = settings.path
        self.pipe: Any = load(
            settings.path,
            settings.backend,
            settings.device,
            manifest=self.manifest,
            build=settings.build,
            progress=LoggedProgress(),
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.spec = pipeline_spec(self.pipe)
        self.parameters = inspect.signature(self.pipe.__call__).parameters
        self.max_batch, self._min_inputs = _batch_range(self.manifest, settings.max_batch_size)
        self.drops = False
        self._known: dict[Key, dict[str, Any]] = {}

    @property
    def _passes(self) -> int:
        return self.spec.passes if self.spec else 2

    @property
    def prompts(self) -> tuple[str, ...]:
        """What can be drawn to try the pipeline."""
        return (self.spec.prompts if self.spec else ()) or PROMPTS

    def warm_up(self) -> Info:
        """Draws until everything is allocated and compiled, and finds out what batches do to a picture here."""
        options = call_options(self.pipe, self.path)
        guidance = self.spec.guidance if self.spec else "guidance_scale"
        prompts = self.prompts
        pair = [prompts[-1], prompts[0]]
        few = {**options, "num_inference_steps": PROBE_STEPS} if "num_inference_steps" in self.parameters else options
        (alone,) = self._draw([prompts[0]], [0], few, Watch()).values()
        difference = 0.0
        if self.max_batch > 1:
            difference = _levels(alone, self._draw(pair, [1, 0], few, Watch())[1])
            self.drops = self._may_drop(pair, few, alone, max(1.0, difference))
        if self.max_batch > 2:  # a batch that does not fit the memory should not wait for its first users
            count = self.max_batch
            self._draw([prompts[0]] * count, list(range(count)), few, Watch())
        return Info(
            identity=identity(self.path),
            backend=getattr(self.pipe, "obsdiff_backend", "torch"),
            device=str(self.pipe.device),
            max_batch=self.max_batch,
            height=alone.height,
            width=alone.width,
            steps=int(options.get("num_inference_steps") or self._default("num_inference_steps") or 1),
            guidance=options.get(guidance, self._default(guidance)),
            sides=_sides(self.manifest),
            difference=difference,
            drops=self.drops,
        )

    def _default(self, name: str) -> Any:
        value = self.parameters[name].default if name in self.parameters else None
        return None if value is inspect.Parameter.empty else value

    def _may_drop(self, prompts: list[str], options: Mapping[str, Any], alone: Image.Image, limit: float) -> bool:
        """Whether a picture survives another's leaving the batch. Tried, since no pipeline says which of its tensors
        have a row for each picture: a family whose callback cannot replace all of them fails here."""
        steps = 0

        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1

        self.drops = True
        try:
            drawn = self._draw(prompts, [1, 0], options, Watch(gone=lambda: {0} if steps >= 2 else set(), step=count))
        except Exception:  # whatever a pipeline raises when tensors do not fit each other
            return False
        return set(drawn) == {1} and _levels(alone, drawn[1]) <= limit

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], key: Key, watch: Watch) -> dict[int, Image.Image]:
        """The pictures by index, without those that `watch.gone()` let go.

        A picture is the same alone or in any batch. Raises InputError when the pipeline refuses an option.
        """
        return self._draw(prompts, seeds, self._options(key), watch)

    def _options(self, key: Key) -> dict[str, Any]:
        """What to call the pipeline with; looked up once for the options that everybody uses."""
        if key not in self._known:
            overrides = {
                "num_inference_steps": key.steps,
                "guidance_scale": key.guidance,
                "height": key.height,
                "width": key.width,
                "negative_prompt": key.negative_prompt,
            }
            if self.manifest and not _sides(self.manifest):  # it draws one size, and takes no other word for it
                del overrides["height"], overrides["width"]
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = call_options(self.pipe, self.path, overrides)
        return self._known[key]

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any], watch: Watch
    ) -> dict[int, Image.Image]:
        alive = list(range(len(prompts)))
        names = list(getattr(self.pipe, "_callback_tensor_inputs", ["latents"])) if self.drops else ["latents"]
        last, before, done = time.perf_counter(), None, 0

        def after_step(_pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal alive, last, before, done
            now, done = time.perf_counter(), done + 1
            watch.seconds.append(now - last)
            latents = tensors.get("latents")
            previous = before

            def pictures() -> dict[int, Tensor]:
                if latents is None or latents.ndim != 4:
                    return {}
                clean = _predicted(self.pipe.scheduler, index, previous, latents)
                return dict(zip(alive, clean, strict=True))

            watch.step(done, max(done, len(getattr(self.pipe.scheduler, "timesteps", ()))), pictures)
            gone = watch.gone()
            keep = [k for k, one in enumerate(alive) if one not in gone]
            if not keep:
                watch.dropped += len(alive)
                raise Stopped
            if len(keep) < len(alive) and self.drops and len(keep) * self._passes >= self._min_inputs:
                tensors = _slice(tensors, keep, len(alive))
                _slice_memory(self.pipe.scheduler, keep, latents)
                watch.dropped += len(alive) - len(keep)
                alive = [alive[k] for k in keep]
            before, last = tensors.get("latents"), time.perf_counter()
            return tensors

        watched = dict(options)
        steps: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if "callback_on_step_end" in self.parameters:
            watched |= {"callback_on_step_end": after_step, "callback_on_step_end_tensor_inputs": names}
        else:

            def told() -> None:
                after_step(self.pipe, done, None, {})

            steps = after_steps(self.pipe.scheduler, told)
        try:
            with steps:
                images = generate(self.pipe, prompts, seeds, watched)
        except Stopped:
            return {}
        return dict(zip(alive, images, strict=True))

    @torch.no_grad()
    def preview(self, latents: Tensor) -> bytes | None:
        """A small PNG of one picture's latents [C, h, w]; None where the pipeline's decoder does not take them."""
        factor = max(1, max(latents.shape[1:]) // PREVIEW_LATENTS)
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return None
        small = torch.nn.functional.avg_pool2d(latents[None].float(), factor)
        try:
            scaled = small / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
            image = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            (picture,) = self.pipe.image_processor.postprocess(image, output_type="pil")
        except (RuntimeError, AttributeError, ValueError):
            return None
        return encode(picture)


def encode(image: Image.Image) -> bytes:
    """PNG, lightly compressed: a megapixel takes a fifth of the time for a tenth more bytes."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _batch_range(manifest: Manifest | None, asked: int) -> tuple[int, int]:
    """The most pictures in a batch, and the fewest denoiser inputs."""
    if manifest is None or manifest.max_batch is None:
        return asked, 1
    return min(asked, manifest.max_batch), manifest.axes["batch"].min


def _sides(manifest: Manifest | None) -> dict[str, Side]:
    if manifest is None:
        return {axis: Side(16, 4096, 8, "16 to 4096 pixels in steps of 8") for axis in ("height", "width")}
    return {
        axis: Side(
            manifest.axes[axis].min * manifest.vae_scale,
            manifest.axes[axis].max * manifest.vae_scale,
            manifest.axes[axis].multiple * manifest.vae_scale,
            manifest.say_range(axis),
        )
        for axis in ("height", "width")
        if axis in manifest.axes
    }


def _levels(one: Image.Image, other: Image.Image) -> float:
    """The largest difference of two pictures in levels of 8 bits."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).max())


def _slice(tensors: Mapping[str, Any], keep: list[int], count: int) -> dict[str, Any]:
    """Those rows of each tensor; with guidance it has two runs of them, without and with the prompt."""
    rows = {count: keep, 2 * count: [*keep, *(k + count for k in keep)]}
    return {
        name: value[rows[len(value)]] if isinstance(value, Tensor) and len(value) in rows else value
        for name, value in tensors.items()
    }


def _slice_memory(scheduler: Any, keep: list[int], latents: Tensor | None) -> None:
    """The same for what a multistep scheduler remembers of its last steps."""

    def sliced(value: Any) -> Any:
        if isinstance(value, list):
            return [sliced(entry) for entry in value]
        fits = isinstance(value, Tensor) and latents is not None and value.shape == latents.shape
        return value[keep] if fits else value

    for name, value in list(vars(scheduler).items()):
        if isinstance(value, (list, Tensor)):
            setattr(scheduler, name, sliced(value))


def _predicted(scheduler: Any, index: int, before: Tensor | None, latents: Tensor) -> Tensor:
    """What the model takes the clean latents to be after step `index`: with flow matching, along its last straight
    step to the end; otherwise the latents as they are."""
    sigmas = getattr(scheduler, "sigmas", None)
    flow = "FlowMatch" in type(scheduler).__name__
    if not flow or sigmas is None or before is None or before.shape != latents.shape or index + 1 >= len(sigmas):
        return latents
    start, end = float(sigmas[index]), float(sigmas[index + 1])
    return latents - end * (latents - before) / (end - start) if end != start else latents


def check(engine: Engine, key: Key) -> None:
    """Draws a picture in few steps, to see that the engine still works. Raises whatever is wrong with it."""
    few = Key(key.height, key.width, PROBE_STEPS, key.guidance, None)
    try:
        engine.draw([engine.prompts[0]], [0], few, Watch())
    except InputError:
        return
