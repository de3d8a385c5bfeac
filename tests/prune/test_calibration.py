"""Calibration: which inputs the Hessians are made of, and that nothing else comes into them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsdiff.models.graph import TensorDenoiser, random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.models.source import find_source, load_denoiser, load_pipeline
from obsdiff.models.walk import Stage, linear_stages
from obsdiff.prune.calibration import (
    Calibration,
    Collector,
    encode_prompts,
    inputs_of,
    run_batches,
    sample_latents,
    sampler_hessians,
    sampler_of,
)
from obsdiff.prune.hessian import mean
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.timesteps import WEIGHTINGS

from .options import QUICK

MakeRun = Callable[..., Calibration]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@pytest.fixture(scope="module")
def make_run(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Makes a calibration of the tiny model; all share one denoiser, which is not to be changed."""
    source = find_source(tiny_sd3)
    pipe = load_pipeline(source, torch.float32)

    def make(**options: Any) -> Calibration:
        recipe = make_recipe(source, {**QUICK, **options})
        return Calibration(
            sampler_of(pipe, "cpu"),
            pipe.transformer,
            source.spec,
            encode_prompts(pipe, source.spec, recipe, "cpu"),
            recipe,
            "cpu",
            tmp_path_factory.mktemp("calibration"),
            lambda count, note: None,
        )

    return make


@contextmanager
def hooked(modules: dict[str, nn.Module], hook: Callable[[str], Hook]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    yield
    for handle in handles:
        handle.remove()


def stages_of(run: Calibration) -> list[Stage]:
    return linear_stages(run.denoiser, run.spec)


def collect(run: Calibration) -> dict[tuple[str, ...], Any]:
    [(number, hessians)] = list(sampler_hessians(run, [stages_of(run)], set()))
    assert number == 0
    return hessians


def record_noise(run: Calibration) -> Tensor:
    """What the denoiser starts from, prompt by prompt [prompts, channels, height, width]."""
    found: list[Tensor] = []
    for batch in run.batches:
        first: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any], first: list[Tensor] = first) -> None:
            first.append(kwargs["hidden_states"])

        handle = run.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        sample_latents(run.sampler, batch, run.recipe.call_options, run.recipe.seed)
        handle.remove()
        found.append(first[0][: len(batch.prompts)])
    return torch.cat(found)


@pytest.mark.parametrize("model", ["tiny_sd3", "fashion"])
def test_linears_share_a_hessian_exactly_when_they_get_the_same_tensor(
    model: str, request: pytest.FixtureRequest
) -> None:
    source = find_source(request.getfixturevalue(model) if model == "tiny_sd3" else model)
    denoiser = load_denoiser(source, torch.float32)
    shared = inputs_of(linear_stages(denoiser, SD3))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda _module, args: seen.update({name: args[0]})

    with torch.no_grad(), hooked({n: denoiser.get_submodule(n) for names in shared for n in names}, keep):
        axes = {"batch": 2, "height": 8, "width": 8, "tokens": 5}
        TensorDenoiser(denoiser, SD3)(*random_inputs(SD3, source.config, axes).values())
    for names in shared:
        assert all(torch.equal(seen[name], seen[names[0]]) for name in names), names
    firsts = [names[0] for names in shared]
    for position, name in enumerate(firsts):
        same = [
            other
            for other in firsts[:position]
            if seen[other].shape == seen[name].shape and torch.equal(seen[other], seen[name])
        ]
        assert not same, f"{name} could share the Hessian of {same}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timestep_weighting": "uniform"},
        {"timestep_weighting": "linear-increase", "steps": 3},
        {"guidance_scale": 1.0},
        {"num_prompts": 3},
    ],
    ids=str,
)
def test_hessians_are_those_of_hooks_written_by_hand(make_run: MakeRun, options: dict[str, Any]) -> None:
    run = make_run(**options)
    names = [name for names in inputs_of(stages_of(run)) for name in names]
    weights = WEIGHTINGS[run.recipe.timestep_weighting](run.recipe.steps).double()
    total: dict[str, Any] = defaultdict(float)
    count: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)

    def add(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            alpha = weights[calls[name] % run.recipe.steps]  # a batch is one call a step
            total[name] = total[name] + alpha * tokens.T @ tokens
            count[name] += float(alpha) * len(tokens)
            calls[name] += 1

        return hook

    with hooked({name: run.denoiser.get_submodule(name) for name in names}, add):
        hessians = collect(run)
    assert set(calls.values()) == {run.recipe.steps * len(run.batches)}
    for shared, parts in hessians.items():
        found = mean(parts).hessian
        for name in shared:
            wanted = (total[name] / count[name]).float()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_with_auto_even_and_odd_prompts_are_kept_apart(make_run: MakeRun) -> None:
    prompts = ["a red boot", "a bag", "a blue shirt", "a hat", "a green coat"]
    split = collect(make_run(solver="auto", prompts=prompts, num_prompts=5))
    together = collect(make_run(prompts=prompts, num_prompts=5))
    for shared, parts in split.items():
        assert len(parts) == 2
        assert parts[0].weight == pytest.approx(parts[1].weight * 3 / 2)
        wanted = mean(together[shared]).hessian
        torch.testing.assert_close(mean(parts).hessian, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert not torch.allclose(mean(parts[:1]).hessian, mean(parts[1:]).hessian, rtol=1e-3)


def test_an_odd_prompt_leaves_the_even_ones_hessian_alone(make_run: MakeRun) -> None:
    one = collect(make_run(solver="auto", prompts=["a red boot", "a bag", "a blue shirt"], batch_size=3))
    other = collect(make_run(solver="auto", prompts=["a red boot", "a striped sweater", "a blue shirt"], batch_size=3))
    context = ("add_q_proj", "ff_context")
    assert any(part in shared[0] for shared in one for part in context)
    for shared, (even, odd) in one.items():
        torch.testing.assert_close(mean([even]).hessian, mean([other[shared][0]]).hessian, rtol=1e-4, atol=1e-4)
        if any(part in shared[0] for part in context):
            assert not torch.allclose(mean([odd]).hessian, mean([other[shared][1]]).hessian, rtol=1e-3)


def test_the_noise_of_a_prompt_does_not_depend_on_the_batch(make_run: MakeRun) -> None:
    found = [record_noise(make_run(batch_size=size, seed=3)) for size in (1, 2, 3, 4)]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    for k, noise in enumerate(found[0]):
        generator = torch.Generator().manual_seed(3 + k)
        assert torch.equal(noise, torch.randn(1, *noise.shape, generator=generator)[0])


def test_another_seed_is_other_noise(make_run: MakeRun) -> None:
    first, second = (record_noise(make_run(seed=seed)) for seed in (0, 1000))
    assert not torch.equal(first, second)


def test_the_collector_is_told_of_every_step_and_prompt(make_run: MakeRun) -> None:
    run = make_run(num_prompts=3, steps=3)
    collector = Collector(run, [])
    seen: list[tuple[range, float]] = []
    handle = run.denoiser.register_forward_pre_hook(lambda *_: seen.append((collector.prompts, collector.alpha)))
    run_batches(run, collector)
    handle.remove()
    weights = WEIGHTINGS["log-decrease"](3).tolist()
    assert seen == [(prompts, alpha) for prompts in (range(2), range(2, 3)) for alpha in weights]
    assert weights == sorted(weights, reverse=True)


def test_what_is_done_costs_no_run_of_the_sampler(make_run: MakeRun) -> None:
    run = make_run()
    calls: list[int] = []
    handle = run.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    stages = stages_of(run)
    found = {
        k: hessians is None for k, hessians in sampler_hessians(run, [stages[:3], stages[3:6], stages[6:]], {0, 2})
    }
    handle.remove()
    assert found == {0: True, 1: False, 2: True}
    assert len(calls) == run.recipe.steps * len(run.batches)


def test_no_hook_stays_behind(make_run: MakeRun) -> None:
    run = make_run()
    collect(run)
    with pytest.raises(KeyboardInterrupt), Collector(run, inputs_of(stages_of(run))).listening():
        raise KeyboardInterrupt
    assert not [name for name, module in run.denoiser.named_modules() if module._forward_pre_hooks]
