"""What a worker draws with: the same picture in any batch, steps that are told, pictures that leave between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from obsdiff.errors import InputError
from obsdiff.progress import Progress
from obsdiff.runtime import pipeline
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.server.engine import Engine, Watch, encode
from obsdiff.runtime.server.messages import Info, Key, Settings
from obsdiff.runtime.server.process import is_preview

PROMPTS = ["a red ankle boot", "a blue bag", "teal trousers with wide legs", "a sandal"]
SEEDS = [3, 2**64 - 1, 0, 3]
KEY = Key(32, 32, 6, 4.0, None)


def levels(one: Image.Image, other: Image.Image) -> int:
    pixels = [np.asarray(image, dtype=np.int16) for image in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max())


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request: pytest.FixtureRequest, one_block_bundle: Path) -> Engine:
    made = Engine(Settings(str(one_block_bundle), request.param, "cpu", 4))
    made.warm_up()
    return made


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_picture_is_the_same_alone_and_in_any_batch(engine: Engine, one_block_bundle: Path, guidance: float) -> None:
    key = Key(32, 32, 6, guidance, None)
    pipe = load(one_block_bundle, "torch", "cpu")
    options = call_options(pipe, one_block_bundle, {"num_inference_steps": 6, "guidance_scale": guidance})
    together = engine.draw(PROMPTS, SEEDS, key, Watch())
    assert list(together) == [0, 1, 2, 3]
    assert levels(together[0], together[3]) > 1, "the prompt matters"
    for index, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        (bare,) = generate(pipe, [prompt], [seed], options)
        assert levels(together[index], bare) <= 1
        assert levels(engine.draw([prompt], [seed], key, Watch())[0], bare) <= 1
        others = engine.draw([PROMPTS[index - 1], prompt], [9, seed], key, Watch())
        assert levels(others[1], bare) <= 1


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("gone", [{0}, {1, 3}, {3}, {0, 1, 2}], ids=str)
def test_those_who_leave_between_steps_take_nothing_from_those_who_stay(
    engine: Engine, gone: set[int], guidance: float
) -> None:
    assert engine.drops
    key = Key(32, 48, 6, guidance, "a bag" if guidance > 1 else None)
    whole = engine.draw(PROMPTS, SEEDS, key, Watch())
    sizes: list[int] = []
    watch = Watch(gone=lambda: gone if len(sizes) >= 2 else set(), step=lambda _d, _t, show: sizes.append(len(show())))
    stayed = engine.draw(PROMPTS, SEEDS, key, watch)
    assert set(stayed) == {0, 1, 2, 3} - gone
    assert sizes == [4, 4] + [4 - len(gone)] * 4
    assert watch.dropped == len(gone)
    assert max(levels(stayed[index], whole[index]) for index in stayed) <= 1


def test_when_all_have_gone_the_drawing_stops(engine: Engine) -> None:
    steps: list[int] = []
    watch = Watch(gone=lambda: {0, 1} if len(steps) >= 2 else set(), step=lambda done, _t, _s: steps.append(done))
    assert engine.draw(PROMPTS[:2], SEEDS[:2], KEY, watch) == {}
    assert steps == [1, 2]
    assert watch.dropped == 2
    assert set(engine.draw(PROMPTS[:1], [0], KEY, Watch())) == {0}


def test_each_step_is_told_with_its_time_and_a_preview_that_comes_closer(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    shown: list[torch.Tensor] = []

    def step(done: int, total: int, show: Callable[[], dict[int, torch.Tensor]]) -> None:
        told.append((done, total))
        shown.append(show()[0])
        png = engine.preview(shown[-1])
        assert png
        assert png.startswith(b"\x89PNG")

    watch = Watch(step=step)
    (image,) = engine.draw(PROMPTS[:1], SEEDS[:1], KEY, watch).values()
    assert told == [(k, 6) for k in range(1, 7)]
    assert len(watch.seconds) == 6
    assert all(second > 0 for second in watch.seconds)
    distances = [(latents - shown[-1]).norm().item() for latents in shown]
    assert distances[-2] < distances[0]
    assert encode(image).startswith(b"\x89PNG")


def test_what_the_warm_up_found(one_block_bundle: Path) -> None:
    engine = Engine(Settings(str(one_block_bundle), "auto", "cpu", 3))
    info = engine.warm_up()
    assert info.identity.startswith("sha256:")
    assert (info.backend, info.device, info.max_batch) == ("onnxruntime", "cpu", 3)
    assert (info.height, info.width, info.steps, info.guidance) == (32, 32, 20, 4.0)
    assert (info.sides["height"].min, info.sides["height"].max, info.sides["height"].step) == (16, 48, 8)
    assert info.sides["width"].words == "16 to 48 pixels in steps of 8"
    assert info.difference <= 1
    assert info.drops


def test_a_batch_stays_within_what_the_bundle_takes(one_block_bundle: Path) -> None:
    engine = Engine(Settings(str(one_block_bundle), "torch", "cpu", 10**6))
    assert engine.manifest
    assert engine.max_batch == engine.manifest.axes["batch"].max // 2


FAMILIES = {"fashion": True, "sd3": True, "sdxl": True, "flux": False, "dit": False, "pixart": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_and_none_is_cut_that_cannot_be(
    tiny_model: Callable[[str], Path], family: str, request: pytest.FixtureRequest
) -> None:
    path = tiny_model(family)
    engine = Engine(Settings(str(path), "torch", "cpu", 2))
    info: Info = engine.warm_up()
    assert info.drops == FAMILIES[family]
    key = Key(info.height, info.width, 4, info.guidance, None)
    spec_prompts = engine.spec.prompts if engine.spec else ()
    prompts = list(spec_prompts[:2]) if spec_prompts else PROMPTS[:2]
    steps: list[int] = []
    watch = Watch(gone=lambda: {1} if steps else set(), step=lambda done, _t, _s: steps.append(done))
    pictures = engine.draw(prompts, [0, 1], key, watch)
    assert steps == [1, 2, 3, 4]
    assert set(pictures) == ({0} if info.drops else {0, 1})
    assert engine.draw(prompts, [0, 1], key, Watch(gone=lambda: {0, 1})) == {}


def test_a_setting_that_the_pipeline_refuses_is_the_clients_fault(engine: Engine) -> None:
    with pytest.raises(InputError):
        engine.draw(PROMPTS[:1], [2**64], KEY, Watch())


@pytest.mark.parametrize(
    ("count", "total", "steps"),
    [(0, 10, []), (1, 10, [5]), (3, 20, [5, 10, 15]), (9, 4, [1, 2, 3]), (2, 1, []), (1, 2, [1])],
)
def test_previews_are_spread_over_the_steps(count: int, total: int, steps: list[int]) -> None:
    found: list[Any] = [step for step in range(1, total + 1) if is_preview(step, total, count)]
    assert found == steps


def test_settings_may_forbid_to_build_and_loading_is_logged(
    one_block_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bool] = []

    def load_backend(*given: Any, build: bool, progress: Progress, **options: Any) -> Any:
        seen.append(build)
        with progress.task("building an engine", 3):
            progress.advance(1, "a step")
        return None

    monkeypatch.setattr(pipeline, "load_backend", load_backend)
    with caplog.at_level("INFO", logger="obsdiff.worker"):
        Engine(Settings(str(one_block_bundle), "auto", "cpu", 4, build=False))
        Engine(Settings(str(one_block_bundle), "torch", "cpu", 4))
    assert seen == [False, True]
    assert [record.message for record in caplog.records] == [
        "backend: onnxruntime, the first that is ready (obsdiff tune finds the fastest)",
        "building an engine",
        "building an engine",
    ]
