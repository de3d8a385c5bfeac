"""Denoisers that are given positions in real numbers draw what diffusers' own, complex ones draw."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obsdiff.errors import InputError
from obsdiff.models import graph
from obsdiff.models.rotary import rotary_table, rotate
from obsdiff.models.source import find_source, load_denoiser

Make = Callable[[str], Path]


@torch.no_grad()
def both(model: Path, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What the denoiser gives as diffusers calls it, and what its graph gives for the same arguments."""
    source = find_source(model)
    denoiser = load_denoiser(source, torch.float32)
    expected = denoiser(**arguments, return_dict=False)[0]
    call = graph.TensorDenoiser(denoiser, source.spec)
    assert source.spec.feeds
    named = source.spec.feeds(denoiser, arguments)
    found = call(*(named[entry.name] for entry in call.entries))
    again = denoiser(**arguments, return_dict=False)[0]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, expected, strict=True)), "it was changed"
    return torch.stack(list(expected)), found


@pytest.mark.parametrize("lengths", [(13, 45), (64, 1), (32, 32)])
@pytest.mark.parametrize("sides", [(10, 14), (8, 16)])  # 35 tokens, which are filled up, and 32, which are not
def test_z_image_with_captions_of_any_length(
    tiny_model: Make, lengths: tuple[int, int], sides: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    arguments = {
        "x": [torch.randn(8, 1, *sides) for _ in lengths],
        "t": torch.tensor([0.9, 0.9]),
        "cap_feats": [torch.randn(length, 32) for length in lengths],
    }
    expected, found = both(tiny_model("zimage"), arguments)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sides", [(4, 7), (5, 2)])
def test_qwen_image_with_and_without_a_mask(tiny_model: Make, masked: bool, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, sides[0] * sides[1], 16),
        "timestep": torch.tensor([0.9, 0.9]),
        "encoder_hidden_states": torch.randn(2, 9, 32),
        "encoder_hidden_states_mask": torch.ones(2, 9).tril(5) if masked else None,
        "img_shapes": [[(1, *sides)]] * 2,
    }
    expected, found = both(tiny_model("qwenimage"), arguments)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_qwen_image_for_editing_is_refused(tiny_model: Make) -> None:
    source = find_source(tiny_model("qwenimage"))
    denoiser = load_denoiser(source, torch.float32)
    denoiser.register_to_config(zero_cond_t=True)
    with pytest.raises(InputError, match="zero_cond_t"):
        graph.TensorDenoiser(denoiser, source.spec)


def test_a_table_of_real_numbers_turns_as_its_complex_twin() -> None:
    heads, ids = torch.randn(2, 5, 3, 8), torch.rand(5, 3) * 50
    table = rotary_table(ids, (2, 2, 4), 10000.0)
    assert table.shape == (5, 4, 2)
    turned = rotate(heads, table)
    assert torch.allclose(turned, rotate(heads, torch.view_as_complex(table)))
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)[:, None]
    assert torch.allclose(turned, torch.view_as_real(pairs).flatten(-2), atol=1e-6)
