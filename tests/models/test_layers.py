"""Convolutions as matrices: patches times the matrix are what the convolution computes, whatever its settings."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from obsdiff.models import layers
from obsdiff.models.layers import as_matrix, from_matrix, inputs_of, matrix_shape, pieces, taps
from obsdiff.prune.solvers import NM, is_nm
from obsdiff.prune.solvers.patterns import nm_mask

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """A random convolution; `same` goes without strides, and only zeros may be more than what they are put around."""
    padding: Any = draw(st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return nn.Conv2d(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        draw(PAIRS),
        stride=1 if padding == "same" else draw(PAIRS),
        padding=padding,
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


@settings(deadline=None)
@given(convolutions(), st.integers(1, 3), st.integers(7, 9), st.integers(7, 9), st.integers(0, 9))
@torch.no_grad()
def test_patches_times_the_matrix_are_the_convolution(
    layer: nn.Conv2d, batch: int, height: int, width: int, seed: int
) -> None:
    value = torch.randn(batch, layer.in_channels, height, width, generator=torch.Generator().manual_seed(seed))
    expected = layer(value)
    patches = inputs_of(layer, value)
    assert patches.shape == (batch, expected.shape[2] * expected.shape[3], matrix_shape(layer)[1])
    found = patches @ as_matrix(layer.weight).T
    if layer.bias is not None:
        found += layer.bias
    torch.testing.assert_close(found.transpose(1, 2).reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@given(st.tuples(*[st.integers(1, 5)] * 4))
def test_from_matrix_inverts_as_matrix(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    matrix = as_matrix(weight)
    assert matrix.shape == (shape[0], shape[1] * shape[2] * shape[3])
    assert torch.equal(from_matrix(matrix, weight.shape), weight)


def test_a_linear_is_its_own_matrix() -> None:
    layer, value = nn.Linear(6, 3), torch.randn(2, 5, 6)
    assert as_matrix(layer.weight) is layer.weight is from_matrix(layer.weight, layer.weight.shape)
    assert inputs_of(layer, value) is value
    assert [(samples, inputs is value) for samples, inputs in pieces(layer, value[:])] == [(slice(0, 2), False)]
    assert (taps(layer), matrix_shape(layer)) == (1, (3, 6))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_2_4_of_the_matrix_is_2_4_along_the_input_channels_of_every_tap(groups: int, height: int, width: int) -> None:
    shape = torch.Size([5, 4 * groups, height, width])
    mask = nm_mask(torch.rand(5, shape[1:].numel()), NM(2, 4))
    assert is_nm(mask, NM(2, 4))
    kept = from_matrix(mask, shape)  # [out, in, height, width], as the file has it
    assert kept.unflatten(1, (groups, 4)).sum(2).eq(2).all()


@pytest.mark.parametrize("limit", [1, 2 * 3 * 9 * 36, 10**9])
def test_pieces_are_the_whole(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time at the least, two at a time, all at once."""
    monkeypatch.setattr(layers, "PIECE", limit)
    layer, value = nn.Conv2d(3, 4, 3, padding=1), torch.randn(5, 3, 6, 6)
    found = list(pieces(layer, value))
    assert [samples.stop - samples.start for samples, _ in found] == {1: [1] * 5, 10**9: [5]}.get(limit, [2, 2, 1])
    assert all(len(inputs) == samples.stop - samples.start for samples, inputs in found)
    assert torch.equal(torch.cat([inputs for _, inputs in found]), inputs_of(layer, value))
    assert not list(pieces(layer, value[:0]))


def test_a_convolution_in_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="in 4 groups is no single matrix"):
        taps(nn.Conv2d(4, 4, 3, groups=4))
