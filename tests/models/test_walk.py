"""A spec applied to a denoiser: blocks, filters, units, shapes, and costs against formulas by hand."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from obsdiff.errors import InputError
from obsdiff.models import graph, walk
from obsdiff.models.sd3 import SD3
from obsdiff.models.source import Source, find_source, load_denoiser, meta_denoiser

ENDS = st.none() | st.integers(-12, 12)


@pytest.fixture(scope="module")
def source(tiny_sd3: Path) -> Source:
    return find_source(tiny_sd3)


@pytest.fixture(scope="module")
def denoiser(source: Source) -> nn.Module:
    return load_denoiser(source, torch.float32)


def names_of(stages: list[walk.Stage]) -> list[str]:
    return [name for stage in stages for shared in stage.linears for name in shared]


@given(start=ENDS, stop=ENDS, count=st.integers(1, 12))
def test_blocks_are_chosen_as_python_slices_do(start: int | None, stop: int | None, count: int) -> None:
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    wanted = list(range(count))[start:stop]
    if wanted:
        assert list(walk.parse_blocks(text, count)) == wanted
    else:
        with pytest.raises(InputError, match=f"--blocks {text} selects none of the {count} blocks"):
            walk.parse_blocks(text, count)


@pytest.mark.parametrize(
    "text", ["", "3", "1:2:3", "a:b", "1-3", " 1:2", "1:2\n", "-:3", ":-", "--1:", "+1:2", "1.0:2"]
)
def test_blocks_that_are_no_slice_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write A:B"):
        walk.parse_blocks(text, 8)


@given(text=st.text(alphabet="0123456789:-", max_size=7))
def test_any_text_for_blocks_is_a_range_or_a_sentence(text: str) -> None:
    chosen: range | None = None
    with contextlib.suppress(InputError):
        chosen = walk.parse_blocks(text, 5)
    assert chosen is None or 0 <= chosen[0] <= chosen[-1] < 5


def test_include_and_exclude_are_searched_in_the_full_name(denoiser: nn.Module) -> None:
    everything = names_of(walk.linear_stages(denoiser, SD3))
    assert names_of(walk.linear_stages(denoiser, SD3, include=r"\.ff")) == [n for n in everything if ".ff" in n]
    assert names_of(walk.linear_stages(denoiser, SD3, exclude=r"to_q$")) == [n for n in everything if "to_q" not in n]
    assert names_of(walk.linear_stages(denoiser, SD3, "1:2", "attn", "add")) == [
        n for n in everything if "blocks.1." in n and "attn" in n and "add" not in n
    ]


def test_filters_keep_the_order_and_leave_no_empty_sets(denoiser: nn.Module) -> None:
    stages = walk.linear_stages(denoiser, SD3, exclude="attn|context")
    assert all(stage.linears and all(stage.linears) for stage in stages)
    assert [stage.block for stage in stages] == sorted(stage.block for stage in stages)


def test_groups_are_filtered_by_their_own_full_name(denoiser: nn.Module) -> None:
    assert [stage.name for stage in walk.group_stages(denoiser, SD3, include=r"\.ff$")] == [
        f"transformer_blocks.{block}.ff" for block in range(3)
    ]
    assert [stage.name for stage in walk.group_stages(denoiser, SD3, "0:1", exclude="attn$")] == [
        f"transformer_blocks.0.{name}" for name in ("attn2", "ff", "ff_context")
    ]


@pytest.mark.parametrize("stages_of", [walk.linear_stages, walk.group_stages])
def test_filters_that_leave_nothing_or_are_no_expressions_are_refused(denoiser: nn.Module, stages_of: Any) -> None:
    with pytest.raises(InputError, match="matches --include 'no-such-layer' and --exclude ''"):
        stages_of(denoiser, SD3, include="no-such-layer")
    with pytest.raises(InputError, match=r"--exclude '\.'"):
        stages_of(denoiser, SD3, exclude=".")
    for bad in ({"include": "("}, {"exclude": "*"}):
        with pytest.raises(InputError, match="not a regular expression"):
            stages_of(denoiser, SD3, **bad)


def test_a_linear_is_found_by_name_or_the_sentence_names_it(denoiser: nn.Module) -> None:
    name = "transformer_blocks.1.ff.net.2"
    assert walk.linear(denoiser, name) is denoiser.get_submodule(name)
    assert walk.has(denoiser, name)
    for missing in ("transformer_blocks.9.ff.net.2", "transformer_blocks.2.attn.to_add_out", "nothing"):
        assert not walk.has(denoiser, missing)
        with pytest.raises(InputError, match=rf"{missing} is not there"):
            walk.linear(denoiser, missing)


def test_a_quantised_or_adapted_layer_is_named(source: Source) -> None:
    denoiser = meta_denoiser(source)
    denoiser.transformer_blocks[0].attn.to_q = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn\.to_q is a Sequential.*quantised or adapted"):
        walk.linear(denoiser, "transformer_blocks.0.attn.to_q")


def test_units_are_counted_where_the_block_keeps_them(denoiser: nn.Module) -> None:
    counts = {
        group.name: walk.unit_count(walk.blocks_of(denoiser, SD3)[0].module, group) for group in SD3.blocks[0].groups
    }
    assert counts == {"attn": 4, "attn2": 4, "ff": 128, "ff_context": 128}


@given(data=st.data(), of=st.integers(1, 6), size=st.integers(1, 4), copies=st.integers(1, 3))
def test_the_entries_of_units_are_those_of_a_reshaped_axis(
    data: st.DataObject, of: int, size: int, copies: int
) -> None:
    units = data.draw(st.lists(st.integers(0, of - 1), unique=True, min_size=1))
    length = of * size * copies
    found = walk.unit_entries(torch.tensor(units), of, length, copies)
    assert found.tolist() == torch.arange(length).view(copies, of, size)[:, units].flatten().tolist()


def test_random_inputs_have_the_shapes_and_depend_on_the_seed_alone(source: Source) -> None:
    axes = {"batch": 3, "height": 6, "width": 10, "tokens": 7}
    first, again, other = (graph.random_inputs(SD3, source.config, axes, seed=seed) for seed in (1, 1, 2))
    assert list(first) == [entry.name for entry in SD3.inputs]
    assert first["hidden_states"].shape == (3, source.config["in_channels"], 6, 10)
    assert first["encoder_hidden_states"].shape == (3, 7, source.config["joint_attention_dim"])
    assert first["timestep"].shape == (3,)
    assert 0 <= first["timestep"].min() <= first["timestep"].max() <= 1000
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_timestep_stays_float32_at_any_precision(source: Source) -> None:
    inputs = graph.random_inputs(SD3, source.config, {"batch": 1, "height": 8, "width": 8, "tokens": 2}, torch.bfloat16)
    assert inputs.pop("timestep").dtype == torch.float32
    assert {value.dtype for value in inputs.values()} == {torch.bfloat16}


@torch.no_grad()
def test_the_denoiser_as_a_function_of_tensors_is_the_denoiser(denoiser: nn.Module, source: Source) -> None:
    axes = {"batch": 2, "height": 8, "width": 4, "tokens": 5}
    inputs = graph.random_inputs(SD3, source.config, axes)
    found = graph.TensorDenoiser(denoiser, SD3)(*inputs.values())
    assert torch.equal(found, denoiser(**inputs).sample)
    assert found.shape == graph.shape_of(SD3.output, source.config, axes)


@pytest.mark.parametrize(
    "axes",
    [
        {"batch": 1, "height": 8, "width": 8, "tokens": 12},
        {"batch": 3, "height": 4, "width": 6, "tokens": 1},
    ],
    ids=["own-size", "other-size"],
)
def test_macs_are_those_of_a_formula_by_hand(source: Source, axes: dict[str, int]) -> None:
    config = source.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    pixels, words = axes["height"] * axes["width"] // patch**2, axes["tokens"]
    last = config["num_layers"] - 1
    total = pixels * patch**2 * channels * width  # patches
    total += words * config["joint_attention_dim"] * width  # words
    total += (256 + width) * width  # time
    total += (config["pooled_projection_dim"] + width) * width  # the pooled prompt
    for block in range(config["num_layers"]):
        dual = block in config["dual_attention_layers"]
        total += width * width * ((9 if dual else 6) + (2 if block == last else 6))  # modulation of both streams
        total += 4 * pixels * width**2 + (3 if block == last else 4) * words * width**2  # q, k, v, out
        total += 2 * (pixels + words) ** 2 * width  # joint attention
        total += 8 * pixels * width**2 + (0 if block == last else 8 * words * width**2)  # feed-forward
        if dual:
            total += 4 * pixels * width**2 + 2 * pixels**2 * width
    total += 2 * width**2 + pixels * width * patch**2 * config["out_channels"]  # the output
    found = graph.count_macs(meta_denoiser(source), SD3, config, axes)
    assert found == axes["batch"] * total
