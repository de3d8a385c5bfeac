"""The rules of 2:4: counted by hand, and for the shapes and dtypes that have no sparse kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.export.sparsity import misfit, not_24
from obsdiff.models.layers import as_matrix
from obsdiff.prune.solvers.patterns import NM, nm_mask


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31), st.floats(0.2, 1))
def test_groups_are_counted_as_a_loop_counts_them(out: int, groups: int, seed: int, share: float) -> None:
    weight = torch.from_numpy(np.random.default_rng(seed).random((out, groups * 4)) < share)
    bad = sum(int(weight[row, 4 * group : 4 * group + 4].sum()) > 2 for row in range(out) for group in range(groups))
    said = not_24(weight)
    if not bad:
        assert said == ""
    elif 2 * bad > out * groups:
        assert said == "dense weights"
    else:
        assert said == f"{bad} of {out * groups} groups of 4 have more than 2 weights"


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_a_convolution_counts_channels_of_each_tap(out: int, groups: int, seed: int) -> None:
    weight = torch.randn(out, groups * 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    assert not_24(weight) == "dense weights"
    mask = nm_mask(as_matrix(weight).abs(), NM(2, 4))
    pruned = (as_matrix(weight) * mask).reshape(out, 3, 3, -1).permute(0, 3, 1, 2)
    assert not_24(pruned) == ""
    assert not_24(weight[:, : groups * 4 - 1]) == f"K = {groups * 4 - 1} is no multiple of 4"


@pytest.mark.parametrize(
    ("shape", "precision", "words"),
    [
        ((64, 64), "fp16", ""),
        ((16, 48), "bf16", ""),
        ((64, 20), "fp16", "K = 20 is no multiple of 16 (fp16)"),
        ((24, 64), "bf16", "out = 24 is no multiple of 16 (bf16)"),
        ((64, 64), "fp32", "fp32: sparse tensor cores take 2:4 weights in fp16"),
    ],
)
def test_shapes_and_dtypes_without_a_sparse_kernel(shape: tuple[int, int], precision: str, words: str) -> None:
    said = misfit(shape, precision)
    assert said.startswith(words)
    assert bool(said) == bool(words)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_multiple_is_the_one_that_torch_goes_by(precision: str) -> None:
    from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT as Sparse

    rule = Sparse._DTYPE_SHAPE_CONSTRAINTS[{"fp16": torch.float16, "bf16": torch.bfloat16}[precision]]
    assert not misfit((rule.sparse_min_rows, rule.sparse_min_cols), precision)
    assert misfit((rule.sparse_min_rows, rule.sparse_min_cols - 4), precision)
    assert misfit((rule.sparse_min_rows - 4, rule.sparse_min_cols), precision)
