"""Sizes and costs against numbers counted by hand from the architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from obsdiff.checkpoint import GroupRecord
from obsdiff.errors import InputError
from obsdiff.export.totals import count_nonzero, count_totals, default_axes
from obsdiff.models.source import Source, find_source, load_denoiser

Kept = Mapping[tuple[int, str], int]


def count_by_hand(config: Mapping[str, Any], axes: Mapping[str, int], kept: Kept) -> tuple[int, int]:
    """Parameters (with the position table) and MACs of an SD3 whose groups keep so many units, written out."""
    heads, size, layers = config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]
    width, patch = heads * size, config["patch_size"]
    area, channels, out = patch**2, config["in_channels"], config["out_channels"]
    text, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    batch, tokens = axes["batch"], axes["tokens"]
    image = (axes["height"] // patch) * (axes["width"] // patch)
    both = image + tokens

    parameters = config["pos_embed_max_size"] ** 2 * width
    macs = 0

    def linear(inputs: int, outputs: int, rows: int) -> None:
        nonlocal parameters, macs
        parameters += (inputs + 1) * outputs
        macs += rows * inputs * outputs

    linear(channels * area, width, image)
    linear(256, width, 1)
    linear(width, width, 1)
    linear(pooled, width, 1)
    linear(width, width, 1)
    linear(text, width, tokens)
    for block in range(layers):
        last, second = block == layers - 1, block in config["dual_attention_layers"]
        inner = size * kept.get((block, "attn"), heads)
        linear(width, (9 if second else 6) * width, 1)
        linear(width, (2 if last else 6) * width, 1)
        for rows in (image, tokens):
            for _ in range(3):
                linear(width, inner, rows)
        macs += 2 * both * both * inner
        linear(inner, width, image)
        if not last:
            linear(inner, width, tokens)
        parameters += 4 * size if config["qk_norm"] else 0
        if second:
            inner = size * kept.get((block, "attn2"), heads)
            for _ in range(3):
                linear(width, inner, image)
            macs += 2 * image * image * inner
            linear(inner, width, image)
            parameters += 2 * size if config["qk_norm"] else 0
        neurons = kept.get((block, "ff"), 4 * width)
        linear(width, neurons, image)
        linear(neurons, width, image)
        if not last:
            neurons = kept.get((block, "ff_context"), 4 * width)
            linear(width, neurons, tokens)
            linear(neurons, width, tokens)
    linear(width, 2 * width, 1)
    linear(width, area * out, image)
    return parameters, batch * macs


RECORDS = [
    GroupRecord(block=0, name="attn", kind="heads", kept=[0, 3], of=4),
    GroupRecord(block=0, name="attn2", kind="heads", kept=[1], of=4),
    GroupRecord(block=1, name="ff", kind="neurons", kept=list(range(50)), of=128),
    GroupRecord(block=0, name="ff_context", kind="neurons", kept=[7], of=128),
    GroupRecord(block=2, name="attn", kind="heads", kept=[0, 1, 2], of=4),
    GroupRecord(block=2, name="ff", kind="neurons", kept=list(range(100)), of=128),
]
AXES = [
    {"batch": 1, "height": 8, "width": 8, "tokens": 12},
    {"batch": 3, "height": 6, "width": 12, "tokens": 77},
]


@pytest.fixture(scope="module")
def source(tiny_sd3: Path) -> Source:
    return find_source(tiny_sd3)


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("records", [[], RECORDS], ids=["dense", "shrunk"])
def test_parameters_and_macs_are_those_counted_by_hand(
    source: Source, axes: dict[str, int], records: list[GroupRecord]
) -> None:
    kept = {(record.block, record.name): len(record.kept) for record in records}
    parameters, macs = count_by_hand(source.config, axes, kept)
    found = count_totals(source, records, axes, 2)
    assert (found.parameters, found.macs) == (parameters, macs)
    assert (found.bytes, found.nonzero) == (2 * parameters, parameters)


def test_the_embedded_model_is_counted_like_any_other() -> None:
    fashion = find_source("fashion")
    axes = default_axes(fashion)
    assert axes == {"batch": 1, "height": 8, "width": 8, "tokens": 12}
    found = count_totals(fashion, [], axes, 4)
    assert (found.parameters, found.macs) == count_by_hand(fashion.config, axes, {})


def test_every_loaded_tensor_is_counted(source: Source) -> None:
    state = load_denoiser(source, torch.float32).state_dict()
    assert count_totals(source, [], AXES[0], 1).parameters == sum(tensor.numel() for tensor in state.values())


def test_nonzero_entries_are_counted() -> None:
    weights = {"a": torch.tensor([[0.0, 1.0], [-0.0, float("nan")]]), "b": torch.zeros(3), "c": torch.ones(2).half()}
    assert count_nonzero(weights) == 4
    assert count_nonzero({}) == 0


def test_a_count_of_nonzero_entries_is_never_more_than_there_are(source: Source) -> None:
    dense = count_totals(source, [], AXES[0], 1)
    assert count_totals(source, [], AXES[0], 1, nonzero=10).nonzero == 10
    assert count_totals(source, [], AXES[0], 1, nonzero=10**9).nonzero == dense.parameters


def test_records_that_do_not_fit_are_refused(source: Source) -> None:
    with pytest.raises(InputError, match=r"transformer_blocks\.9\.ff"):
        count_totals(source, [RECORDS[2].model_copy(update={"block": 9})], AXES[0], 1)
