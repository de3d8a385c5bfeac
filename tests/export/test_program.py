"""What the denoiser is traced at, and over which ranges."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from obsdiff.errors import InputError
from obsdiff.export.bundle import WEIGHTS, open_bundle, read_manifest
from obsdiff.export.program import empty_denoiser, load_module, traced_sizes
from obsdiff.export.schema import Axis


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    multiple = draw(st.sampled_from([1, 2, 4]))
    low, opt, high = sorted(draw(st.integers(1, 40)) * multiple for _ in range(3))
    return Axis(min=low, opt=opt, max=high, multiple=multiple)


@settings(deadline=None)
@given(batch=axes(), height=axes(), width=axes())
def test_traced_sizes_are_allowed_and_differ_where_they_can(batch: Axis, height: Axis, width: Axis) -> None:
    ranges = {"batch": batch, "height": height, "width": width}
    sizes = traced_sizes(ranges)
    assert all(ranges[name].allows(sizes[name]) for name in ("height", "width"))
    assert sizes["batch"] >= min(max(2, batch.min), batch.max)
    if width.min < width.max:
        assert sizes["height"] != sizes["width"]


def test_a_model_without_a_picture_axis_is_traced_as_it_is() -> None:
    assert traced_sizes({"batch": Axis(min=1, opt=1, max=4)}) == {"batch": 2}


def test_the_module_has_the_weights_and_needs_no_gradient(graphless: Path) -> None:
    module = load_module(graphless, open_bundle(graphless), "cpu")
    parameters = dict(module.named_parameters())
    assert not module.training
    assert all(not value.requires_grad and value.device.type == "cpu" for value in parameters.values())
    with torch.device("meta"):
        empty = dict(empty_denoiser(graphless, open_bundle(graphless)).named_parameters())
    assert {f"denoiser.{name}": value.shape for name, value in empty.items()} == {
        name: value.shape for name, value in parameters.items()
    }


def test_weights_that_do_not_fit_are_said(graphless: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(graphless, tmp_path / "bundle"))
    weights = load_file(bundle / WEIGHTS)
    save_file({name: value for name, value in weights.items() if not name.startswith("proj_out")}, bundle / WEIGHTS)
    with pytest.raises(InputError, match=r"config and weights do not fit each other: .*proj_out") as caught:
        load_module(bundle, read_manifest(bundle), "cpu")
    assert len(str(caught.value).splitlines()) == 1
