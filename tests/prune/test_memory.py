"""Memory: what a prune will need, and a refusal that says what would lower it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from obsdiff.errors import InputError
from obsdiff.models import walk
from obsdiff.models.source import find_source, meta_denoiser
from obsdiff.prune.memory import check, predict
from obsdiff.prune.packages import by_block, cut
from obsdiff.prune.recipe import Recipe, make_recipe
from obsdiff.prune.stage import prune

from .options import QUICK

Need = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def need() -> Need:
    """Predicts for the embedded model: `packages` and `tokens` as given, other options into the recipe."""
    source = find_source("fashion")
    denoiser = meta_denoiser(source)
    stages = walk.linear_stages(denoiser, source.spec)

    def predicted(packages: int | None = 4, tokens: int = 1000, **options: Any) -> dict[str, float]:
        recipe = make_recipe(source, {"device": "cpu", "solver": "obs", **options})
        chosen = cut(stages, packages) if packages else by_block(stages)
        return predict(denoiser, source.spec, chosen, recipe, tokens)

    return predicted


def recipe_of(**options: Any) -> Recipe:
    return make_recipe(find_source("fashion"), {"device": "cpu", **options})


def test_it_grows_with_the_tokens_of_a_call(need: Need) -> None:
    few, many = need(tokens=1000), need(tokens=4000)
    assert many["activations"] == 4 * few["activations"] > 0
    assert {name for name in few if few[name] != many[name]} == {"activations"}


def test_auto_and_the_asymmetric_target_double_the_hessians(need: Need) -> None:
    stream = {"packages": None, "calibration": "stream"}
    one = need(**stream)["hessians"]
    assert need(**stream, solver="auto")["hessians"] == 2 * one
    assert need(**stream, target="asymmetric")["hessians"] == 2 * one
    assert need(**stream, solver="auto", target="asymmetric")["hessians"] == 4 * one


def test_hessians_of_one_package_are_one_for_each_shared_input(need: Need) -> None:
    source = find_source("fashion")
    denoiser = meta_denoiser(source)
    widths = [
        walk.linear(denoiser, shared[0]).in_features
        for stage in walk.linear_stages(denoiser, source.spec)
        for shared in stage.linears
    ]
    assert need(packages=1)["hessians"] == sum(4 * width**2 for width in widths)


def test_it_falls_with_more_packages_with_a_stream_and_with_offload(need: Need) -> None:
    found = [need(packages=count)["hessians"] for count in (1, 4, 16)]
    assert found == sorted(set(found), reverse=True)
    stream = need(packages=None, calibration="stream")
    offloaded = need(packages=None, calibration="stream", offload=True)
    assert stream["hessians"] < found[0]
    assert offloaded["weights"] < 0.5 * stream["weights"]
    assert need(packages=None, calibration="stream", dtype="bfloat16")["weights"] == stream["weights"] / 2


def test_the_asymmetric_target_holds_a_dense_twin_of_a_block(need: Need) -> None:
    stream = {"packages": None, "calibration": "stream"}
    source = find_source("fashion")
    largest = max(
        sum(p.numel() for p in block.module.parameters())
        for block in walk.blocks_of(meta_denoiser(source), source.spec)
    )
    assert need(**stream, target="asymmetric")["weights"] == need(**stream)["weights"] + 4 * largest


def test_recorded_activations_count_up_to_the_limit_of_the_cache(need: Need) -> None:
    stream = {"packages": None, "calibration": "stream", "num_prompts": 8, "batch_size": 4, "steps": 3}
    assert need(num_prompts=8)["caches"] == 0
    found = need(**stream)["caches"]
    assert found == 2 * 3 * 1000 * 128 * 4  # calls, tokens, width, bytes
    assert need(**stream, call_share=0.5)["caches"] == found / 2
    assert need(**stream, target="asymmetric")["caches"] == 2 * found
    assert need(**stream, cache_gb=0.001)["caches"] == 1e6


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))


NEED = {"weights": 3e9, "hessians": 2e9, "reserve": 0.5e9}


def test_what_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 5.5e9)
    check(NEED, "cpu", recipe_of())
    with_free(monkeypatch, 5.4e9)
    with pytest.raises(InputError):
        check(NEED, "cpu", recipe_of())


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {},
            "a smaller --batch-size, --calibration stream, more --packages, "
            "--solver alps, which holds half the hessians",
        ),
        ({"solver": "obs"}, "a smaller --batch-size, --calibration stream, more --packages"),
        ({"solver": "obs", "calibration": "stream"}, "a smaller --batch-size, --offload"),
        ({"solver": "alps", "calibration": "stream", "offload": True}, "a smaller --batch-size"),
    ],
    ids=str,
)
def test_a_refusal_names_the_parts_and_what_would_help(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], advice: str
) -> None:
    with_free(monkeypatch, 2e9)
    with pytest.raises(InputError) as caught:
        check(NEED, "cpu", recipe_of(**options))
    assert str(caught.value) == (
        "this prune needs about 5.5 GB on cpu (weights 3.0, hessians 2.0, reserve 0.5) and 2.0 GB are free: "
        f"try {advice}"
    )


@pytest.mark.parametrize("calibration", ["sampler", "stream"])
def test_a_prune_that_cannot_fit_is_refused_before_it_samples(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: str
) -> None:
    options = {**QUICK, "calibration": calibration, "packages": None}
    with_free(monkeypatch, 1e8)
    with pytest.raises(InputError, match=r"this prune needs about 0\.\d GB on cpu .* and 0\.1 GB are free"):
        prune(tiny_sd3, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_more_prompts_in_a_batch_need_more(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr("obsdiff.prune.memory.check", lambda need, *_: found.append(need))
    for batch_size, guidance in ((1, 4.0), (4, 4.0), (4, 1.0)):
        options = {**QUICK, "batch_size": batch_size, "guidance_scale": guidance, "steps": 1, "packages": 1}
        prune(tiny_sd3, tmp_path / f"{batch_size}-{guidance}", **options)
    one, four, unguided = (need["activations"] for need in found)
    assert four == 4 * one == 2 * unguided
