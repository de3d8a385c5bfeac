"""What each family's spec says of the architecture is what the architecture does, on its tiny pipeline (tests/tiny)."""

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsdiff.models import FAMILIES, GroupRecord, ModelSpec, graph, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, find_source, load_denoiser, load_pipeline
from obsdiff.prune import calibration
from obsdiff.prune.recipe import make_recipe
from obsdiff.runtime.generate import call_options, generate

# Linears inside blocks that are deliberately left out: they map the time embedding to scales and shifts, a few hundred
# numbers that steer every token of the block at once, and they run once an image and not once a token.
MODULATION = {
    "sd3": {"norm1.linear", "norm1_context.linear"},
    "qwenimage": {"img_mod.1", "txt_mod.1"},
    "zimage": {"adaLN_modulation.0"},
    "unet": {"time_emb_proj"},
    "flux": {"norm1.linear", "norm1_context.linear", "norm.linear"},
    "dit": {"norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2"},
    "sana": {"ff.conv_depth"},  # depthwise: nine weights a channel, which go with the channel
}
AXES = {"batch": 2, "height": 8, "width": 16, "tokens": 7}
NAMES = ["fashion", *(spec.family for spec in FAMILIES.values()), "sdxl"]


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Source:
    return find_source(tiny_model(request.param))


@pytest.fixture(scope="module")
def spec(source: Source) -> ModelSpec:
    return source.spec


@pytest.fixture(scope="module")
def denoiser(source: Source) -> nn.Module:
    return load_denoiser(source, torch.float32)


@pytest.fixture(scope="module")
def stages(denoiser: nn.Module, spec: ModelSpec) -> list[walk.Stage]:
    return walk.linear_stages(denoiser, spec)


@pytest.fixture(scope="module")
def calls(denoiser: nn.Module, source: Source) -> list[tuple[str, Tensor]]:
    """Every linear of the blocks with its input, in the order in which one denoiser call reaches them."""
    return list(trace(denoiser, source))


@torch.no_grad()
def trace(denoiser: nn.Module, source: Source) -> Iterator[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.append((name, args[0]))
        )
        for name in block_linears(denoiser, source.spec)
    ]
    output(denoiser, source)
    for hook in hooks:
        hook.remove()
    yield from seen


@torch.no_grad()
def output(denoiser: nn.Module, source: Source, seed: int = 0) -> Tensor:
    call = graph.TensorDenoiser(denoiser, source.spec)
    return call(*graph.random_inputs(source.spec, source.config, AXES, seed=seed).values())


def block_linears(denoiser: nn.Module, spec: ModelSpec) -> list[str]:
    """Full names of all linears and convolutions that lie in a block, each once."""
    return list(
        dict.fromkeys(
            block.full(name)
            for block in walk.blocks_of(denoiser, spec)
            for name, module in block.module.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        )
    )


def names_of(stages: list[walk.Stage]) -> list[str]:
    return [name for stage in stages for shared in stage.linears for name in shared]


def local(name: str, denoiser: nn.Module, spec: ModelSpec) -> str:
    """The name within the innermost block that holds the linear."""
    owners = [block.name for block in walk.blocks_of(denoiser, spec) if name.startswith(f"{block.name}.")]
    return name.removeprefix(f"{max(owners, key=len)}.")


def test_no_linear_of_a_block_is_missed_and_none_is_there_twice(
    denoiser: nn.Module, spec: ModelSpec, stages: list[walk.Stage]
) -> None:
    found, every = names_of(stages), block_linears(denoiser, spec)
    assert len(found) == len(set(found))
    assert set(found) <= set(every)
    assert {local(name, denoiser, spec) for name in set(every) - set(found)} == MODULATION.get(spec.family, set())


def test_stages_are_in_forward_order(stages: list[walk.Stage], calls: list[tuple[str, Tensor]]) -> None:
    position = {name: number for number, (name, _) in enumerate(calls)}
    first = [min(position[name] for shared in stage.linears for name in shared) for stage in stages]
    blocks = [stage.block for stage in stages]
    assert blocks == sorted(blocks)
    assert first == sorted(first)


def test_linears_of_one_set_get_the_same_tensor(stages: list[walk.Stage], calls: list[tuple[str, Tensor]]) -> None:
    inputs = dict(calls)
    for stage in stages:
        for first, *others in (shared for shared in stage.linears):
            for other in others:
                assert torch.equal(inputs[first], inputs[other]), f"{first} and {other} do not share an input"


def test_sets_of_one_stage_get_different_tensors(stages: list[walk.Stage], calls: list[tuple[str, Tensor]]) -> None:
    inputs = dict(calls)
    for stage in stages:
        firsts = [inputs[shared[0]] for shared in stage.linears]
        for number, one in enumerate(firsts):
            for other in firsts[number + 1 :]:
                assert one.shape != other.shape or not torch.equal(one, other), f"{stage.name}: one Hessian is enough"


@torch.no_grad()
def test_linears_of_one_stage_do_not_depend_on_each_other(
    denoiser: nn.Module, source: Source, stages: list[walk.Stage], calls: list[tuple[str, Tensor]]
) -> None:
    inputs, tried = dict(calls), set()
    for stage in stages:
        kind = tuple(local(name, denoiser, source.spec) for name in names_of([stage]))
        if len(kind) == 1 or kind in tried:  # one block of each kind is enough
            continue
        tried.add(kind)
        for shared in stage.linears:
            weight = walk.linear(denoiser, shared[0]).weight
            kept = weight.clone()
            weight.zero_()
            changed = dict(trace(denoiser, source))
            weight.copy_(kept)
            for name in names_of([stage]):
                assert torch.equal(changed[name], inputs[name]), f"{name} depends on {shared[0]}"


def test_every_call_reaches_every_prunable_linear_once(
    stages: list[walk.Stage], calls: list[tuple[str, Tensor]]
) -> None:
    reached = [name for name, _ in calls if name in set(names_of(stages))]
    assert sorted(reached) == sorted(names_of(stages))


def group_stages(denoiser: nn.Module, spec: ModelSpec) -> list[walk.Stage]:
    return walk.group_stages(denoiser, spec) if any(kind.groups for kind in spec.blocks) else []


def test_what_reads_a_unit_is_prunable_and_takes_part_in_the_calibration(
    denoiser: nn.Module, spec: ModelSpec, stages: list[walk.Stage]
) -> None:
    found = set(names_of(stages))
    for stage in group_stages(denoiser, spec):
        assert set(names_of([stage])) <= found


@torch.no_grad()
@pytest.mark.parametrize("keep", ["one", "some"])
def test_units_that_are_zeroed_can_be_removed(denoiser: nn.Module, source: Source, keep: str) -> None:
    """Every group alone and all of them together: zeros in what reads a unit, then no unit, give the same picture."""
    found = group_stages(denoiser, source.spec)
    if not found:
        assert source.spec.heads_refused
        return
    records = []
    for stage in found:
        assert stage.group
        units = walk.unit_count(denoiser.get_submodule(stage.parent), stage.group)
        kept = [units - 1] if keep == "one" else list(range(1, units, 2)) or [0]
        record = GroupRecord(block=stage.block, name=stage.group.name, kind=stage.group.kind, kept=kept, of=units)
        records.append(record)
    kinds: dict[tuple[str, str], list[GroupRecord]] = {}
    for record, stage in zip(records, found, strict=True):  # the first: nothing may read a last block's
        kinds.setdefault((record.name, local(stage.linears[0][0], denoiser, source.spec)), [record])
    for chosen in (*kinds.values(), records):
        zeroed = copy.deepcopy(denoiser)
        for record in chosen:
            block, group = walk.find_group(zeroed, source.spec, record)
            for span, axis in walk.spans_of(block.module, group):
                gone = walk.span_entries(block.module, group, span, axis, walk.gone_units(record))
                if axis == 1:
                    walk.linear(block.module, span.linear).weight[:, gone] = 0
        expected = output(zeroed, source)
        assert (expected - output(denoiser, source)).norm() > 1e-4 * expected.norm(), "the units did nothing"
        before = sum(p.numel() for p in zeroed.parameters())
        shrink(zeroed, source.spec, chosen)
        assert sum(p.numel() for p in zeroed.parameters()) < before
        found_output = output(zeroed, source)
        assert (found_output - expected).norm() <= 1e-5 * expected.norm(), chosen


@torch.no_grad()
def test_what_a_block_returns_is_what_the_next_one_gets(denoiser: nn.Module, source: Source, spec: ModelSpec) -> None:
    """`carried` names a block's inputs in the order of the outputs that replace them."""
    if not spec.carried:
        return
    got: list[dict[str, Any]] = []
    gave: list[tuple[Tensor, ...]] = []
    hooks = []

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got.append(dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs)

    for block in walk.blocks_of(denoiser, spec):
        hooks.append(block.module.register_forward_pre_hook(enters, with_kwargs=True))
        hooks.append(
            block.module.register_forward_hook(lambda _b, _a, o: gave.append(o if isinstance(o, tuple) else (o,)))
        )
    output(denoiser, source)
    for hook in hooks:
        hook.remove()
    assert len(got) == len(walk.blocks_of(denoiser, spec))
    for outputs, inputs in zip(gave[:-1], got[1:], strict=True):
        for name, value in zip(spec.carried, outputs, strict=True):
            assert inputs[name] is value


def test_the_pipeline_encodes_prompts_into_the_embeds_of_the_spec(source: Source) -> None:
    pipe: Any = load_pipeline(source)
    assert type(pipe).__name__ in source.spec.pipelines
    if not source.spec.embeds:
        return
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {"device": torch.device("cpu"), "do_classifier_free_guidance": True, **source.spec.encode}
    values = pipe.encode_prompt(prompt=["a bag", "a coat"], **{k: v for k, v in options.items() if k in known})
    names = source.spec.embeds[: len(values)]
    assert len(names) == len(values)
    assert {name for name in names if name} <= inspect.signature(pipe.__call__).parameters.keys()


def test_calibration_samples_what_the_pipeline_draws(source: Source) -> None:
    """From embeddings the same latents as from the prompts: nothing that __call__ tells encode_prompt is missed."""
    prompts = ["a red bag", "a blue coat"]
    recipe = make_recipe(source, {"prompts": prompts, "steps": 2, "solver": "obs"})
    pipe = load_pipeline(source, torch.float32)
    options = call_options(pipe, source.path, {"num_inference_steps": 2})
    wanted = torch.as_tensor(generate(pipe, prompts, [0, 1], options, "latent"))
    (batch,) = calibration.encode_prompts(pipe, source.spec, recipe, "cpu")
    call = {**recipe.call_options, **source.spec.call}
    found = torch.as_tensor(calibration.sample_latents(calibration.sampler_of(pipe, "cpu"), batch, call, 0))
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_the_second_attention_and_the_missing_context_output_of_sd3_are_seen(tiny_sd3: Path) -> None:
    found = names_of(walk.linear_stages(load_denoiser(find_source(tiny_sd3)), find_source(tiny_sd3).spec))
    assert [name for name in found if "attn2.to_q" in name] == ["transformer_blocks.0.attn2.to_q"]
    assert [name for name in found if "to_add_out" in name or "ff_context.net.2" in name] == [
        f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn.to_add_out", "ff_context.net.2")
    ]
