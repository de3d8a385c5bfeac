"""The SD3 family: what its spec says of the architecture is what the architecture does."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsdiff.models import walk
from obsdiff.models.sd3 import SD3
from obsdiff.models.source import Source, find_source, load_denoiser, load_pipeline

# Deliberately left out of `layers`: they map the time embedding to scales and shifts, a few hundred numbers that steer
# every token of the block at once, and they run once an image and not once a token.
MODULATION = {"norm1.linear", "norm1_context.linear"}
AXES = {"batch": 2, "height": 6, "width": 8, "tokens": 7}


@pytest.fixture(scope="module", params=["tiny_sd3", "fashion"])
def source(request: pytest.FixtureRequest) -> Source:
    return find_source("fashion" if request.param == "fashion" else request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def denoiser(source: Source) -> nn.Module:
    return load_denoiser(source, torch.float32)


@pytest.fixture(scope="module")
def stages(denoiser: nn.Module) -> list[walk.Stage]:
    return walk.linear_stages(denoiser, SD3)


@pytest.fixture(scope="module")
def calls(denoiser: nn.Module, source: Source) -> list[tuple[str, Tensor]]:
    """Every linear of the blocks with its input, in the order in which one denoiser call reaches them."""
    return list(trace(denoiser, source))


@torch.no_grad()
def trace(denoiser: nn.Module, source: Source) -> Iterator[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: seen.append((name, args[0])))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(SD3.blocks)
    ]
    denoiser(**walk.random_inputs(SD3, source.config, AXES))
    for hook in hooks:
        hook.remove()
    yield from seen


def block_linears(denoiser: nn.Module) -> set[str]:
    return {
        f"{SD3.blocks}.{number}.{name}"
        for number, block in enumerate(walk.blocks_of(denoiser, SD3))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def names_of(stages: list[walk.Stage]) -> list[str]:
    return [name for stage in stages for shared in stage.linears for name in shared]


def test_no_linear_of_a_block_is_missed_and_none_is_there_twice(denoiser: nn.Module, stages: list[walk.Stage]) -> None:
    found = names_of(stages)
    assert len(found) == len(set(found))
    left_out = {name.split(".", 2)[2] for name in block_linears(denoiser) - set(found)}
    assert set(found) <= block_linears(denoiser)
    assert left_out == MODULATION


def test_the_second_attention_and_the_missing_context_output_are_seen(tiny_sd3: Path) -> None:
    found = names_of(walk.linear_stages(load_denoiser(find_source(tiny_sd3)), SD3))
    assert [name for name in found if "attn2.to_q" in name] == ["transformer_blocks.0.attn2.to_q"]
    assert [name for name in found if "to_add_out" in name or "ff_context.net.2" in name] == [
        f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn.to_add_out", "ff_context.net.2")
    ]


def test_stages_are_in_forward_order(stages: list[walk.Stage], calls: list[tuple[str, Tensor]]) -> None:
    """A linear that comes in a later stage is never an input of one in an earlier stage: in every stream (image or
    context, first or second attention) the stages are reached in their order."""
    position = {name: number for number, (name, _) in enumerate(calls)}

    def stream(name: str) -> str:
        local = name.split(".", 2)[2]
        second = "attn2" if local.startswith("attn2") else ""
        return second or ("context" if "add" in local or "context" in local else "image")

    by_stream: dict[str, list[int]] = {}
    for number, stage in enumerate(stages):
        for shared in stage.linears:
            assert len({stream(name) for name in shared}) == 1
            earliest, latest = min(map(position.__getitem__, shared)), max(map(position.__getitem__, shared))
            reached = by_stream.setdefault(stream(shared[0]), [])
            assert not reached or earliest > reached[-1], f"stage {number} comes too early"
            reached.append(latest)
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
    inputs = dict(calls)
    for stage in stages[:4]:
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


def test_groups_cover_the_prunable_linears(denoiser: nn.Module, stages: list[walk.Stage]) -> None:
    """Every projection that makes or reads a unit is in `layers` too, and every one of `layers` in one group."""
    listed = [name for stage in SD3.layers for shared in stage for name in shared]
    grouped = [name for group in SD3.groups for name in group.linears]
    assert sorted(grouped) == sorted(listed)


def test_units_divide_the_axes_that_they_lie_on(denoiser: nn.Module) -> None:
    for stage in walk.group_stages(denoiser, SD3):
        assert stage.group
        units = walk.unit_count(denoiser, SD3, stage.block, stage.group)
        prefix = f"{SD3.blocks}.{stage.block}."
        for span in stage.group.rows:
            if walk.has(denoiser, prefix + span.linear):
                assert walk.linear(denoiser, prefix + span.linear).out_features % (units * span.copies) == 0
        for span in stage.group.columns:
            if walk.has(denoiser, prefix + span.linear):
                assert walk.linear(denoiser, prefix + span.linear).in_features % (units * span.copies) == 0


def test_the_graph_inputs_are_arguments_of_the_denoiser(denoiser: nn.Module) -> None:
    arguments = inspect.signature(denoiser.forward).parameters
    assert {entry.name for entry in SD3.inputs} <= arguments.keys()
    assert {*SD3.carried} <= {entry.name for entry in SD3.inputs}


@torch.no_grad()
def test_what_a_block_returns_is_what_the_next_one_gets(denoiser: nn.Module, source: Source) -> None:
    """`carried` names a block's inputs in the order of the outputs that replace them."""
    got: list[dict[str, Any]] = []
    gave: list[tuple[Tensor, ...]] = []
    hooks = []
    for block in walk.blocks_of(denoiser, SD3):
        hooks.append(block.register_forward_pre_hook(lambda _b, _a, kw: got.append(kw), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _b, _a, out: gave.append(out)))
    denoiser(**walk.random_inputs(SD3, source.config, AXES))
    for hook in hooks:
        hook.remove()
    for outputs, inputs in zip(gave[:-1], got[1:], strict=True):
        for name, value in zip(SD3.carried, outputs, strict=True):
            assert inputs[name] is value


def test_the_pipeline_encodes_prompts_into_the_embeds_of_the_spec(source: Source) -> None:
    pipe: Any = load_pipeline(source)
    assert type(pipe).__name__ in SD3.pipelines
    values = pipe.encode_prompt(prompt=["a bag", "a coat"], **SD3.encode)
    assert len(values) == len(SD3.embeds)
    assert all(value.shape[0] == 2 for value in values)
    assert set(SD3.embeds) <= inspect.signature(pipe.__call__).parameters.keys()
