"""Shrinking: a unit whose columns are zero in every reader can go, and nothing else may change."""

import copy
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from obsdiff.checkpoint import GroupRecord
from obsdiff.errors import InputError
from obsdiff.models.graph import TensorDenoiser, random_inputs
from obsdiff.models.sd3 import SD3
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, find_source, load_denoiser, meta_denoiser

READERS = {
    "attn": ("attn.to_out.0", "attn.to_add_out"),
    "attn2": ("attn2.to_out.0",),
    "ff": ("ff.net.2",),
    "ff_context": ("ff_context.net.2",),
}
WRITERS = {
    "attn": tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    "attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "ff": ("ff.net.0.proj",),
    "ff_context": ("ff_context.net.0.proj",),
}
SHAPES = (
    {"batch": 1, "height": 8, "width": 8, "tokens": 12},
    {"batch": 3, "height": 6, "width": 10, "tokens": 1},
    {"batch": 2, "height": 4, "width": 8, "tokens": 40},
)


@pytest.fixture(scope="module", params=["tiny_sd3", "fashion"])
def source(request: pytest.FixtureRequest) -> Source:
    return find_source("fashion" if request.param == "fashion" else request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def loaded(source: Source) -> nn.Module:
    return load_denoiser(source, torch.float32)


@pytest.fixture
def denoiser(loaded: nn.Module) -> nn.Module:
    return copy.deepcopy(loaded)


def present(block: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """The linears that the block has: the last one has no context output, and not every block a second attention."""
    found = []
    for name in names:
        try:
            found.append(attrgetter(name)(block))
        except AttributeError:
            continue
    return [linear for linear in found if linear is not None]


def count_units(block: nn.Module, name: str) -> int:
    return getattr(block, name).heads if name.startswith("attn") else present(block, READERS[name])[0].in_features


def make_record(denoiser: nn.Module, number: int, name: str, keep: float, seed: int = 0) -> GroupRecord:
    units = count_units(denoiser.transformer_blocks[number], name)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed + 31 * number))
    kept = sorted(order[: max(1, round(keep * units))].tolist())
    kind = "heads" if name.startswith("attn") else "neurons"
    return GroupRecord(block=number, name=name, kind=kind, kept=kept, of=units)


def every_record(denoiser: nn.Module, keep: float, names: Sequence[str] = tuple(READERS)) -> list[GroupRecord]:
    return [
        make_record(denoiser, number, name, keep)
        for number, block in enumerate(denoiser.transformer_blocks)
        for name in names
        if present(block, READERS[name])
    ]


def silence(denoiser: nn.Module, records: Sequence[GroupRecord]) -> None:
    """Zeroes what the removed units send to all their readers."""
    for record in records:
        gone = [unit for unit in range(record.of) if unit not in record.kept]
        for linear in present(denoiser.transformer_blocks[record.block], READERS[record.name]):
            with torch.no_grad():
                linear.weight.view(linear.out_features, record.of, -1)[:, gone] = 0


@torch.no_grad()
def outputs(denoiser: nn.Module, source: Source) -> list[Tensor]:
    function = TensorDenoiser(denoiser, SD3)
    return [function(*random_inputs(SD3, source.config, axes, seed=seed).values()) for seed, axes in enumerate(SHAPES)]


def assert_same_function(denoiser: nn.Module, source: Source, records: list[GroupRecord]) -> None:
    untouched = outputs(denoiser, source)
    silence(denoiser, records)
    before = outputs(denoiser, source)
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(untouched, before, strict=True)), "the units did matter"
    shrink(denoiser, SD3, records)
    for wanted, got in zip(before, outputs(denoiser, source), strict=True):
        assert (got - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("source", "name"),
    [("tiny_sd3", name) for name in READERS] + [("fashion", name) for name in READERS if name != "attn2"],
    indirect=["source"],
)
def test_units_of_each_kind_go_without_a_trace(denoiser: nn.Module, source: Source, name: str) -> None:
    records = every_record(denoiser, 0.5, [name])
    assert records
    assert_same_function(denoiser, source, records)
    for record in records:
        block = denoiser.transformer_blocks[record.block]
        assert count_units(block, name) == len(record.kept) < record.of


def test_all_kinds_go_from_all_blocks_at_once(denoiser: nn.Module, source: Source) -> None:
    records = every_record(denoiser, 0.4)
    last = len(denoiser.transformer_blocks) - 1
    assert {record.name for record in records if record.block == last} == {"attn", "ff"}
    assert_same_function(denoiser, source, records)


def test_one_unit_of_each_can_be_all_that_is_left(denoiser: nn.Module, source: Source) -> None:
    records = every_record(denoiser, 0)
    assert all(len(record.kept) == 1 for record in records)
    assert_same_function(denoiser, source, records)


def test_without_records_nothing_changes(denoiser: nn.Module, source: Source) -> None:
    before = outputs(denoiser, source)
    shrink(denoiser, SD3, [])
    for wanted, got in zip(before, outputs(denoiser, source), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_keeping_every_unit_changes_nothing(denoiser: nn.Module, source: Source) -> None:
    shapes = {name: value.shape for name, value in denoiser.state_dict().items()}
    shrink(denoiser, SD3, every_record(denoiser, 1))
    assert {name: value.shape for name, value in denoiser.state_dict().items()} == shapes


def test_the_order_in_which_units_are_listed_does_not_matter(denoiser: nn.Module, source: Source) -> None:
    records = every_record(denoiser, 0.5)
    twin = copy.deepcopy(denoiser)
    shrink(denoiser, SD3, records)
    shrink(twin, SD3, [record.model_copy(update={"kept": record.kept[::-1]}) for record in records[::-1]])
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_parameters_are_really_gone(denoiser: nn.Module) -> None:
    records = every_record(denoiser, 0.5)
    expected = sum(p.numel() for p in denoiser.parameters())
    for record in records:
        block, share = denoiser.transformer_blocks[record.block], 1 - len(record.kept) / record.of
        for linear in present(block, READERS[record.name]):
            expected -= round(share * linear.weight.numel())
        for linear in present(block, WRITERS[record.name]):
            expected -= round(share * (linear.weight.numel() + linear.bias.numel()))
    shrink(denoiser, SD3, records)
    assert sum(p.numel() for p in denoiser.parameters()) == expected
    stored = denoiser.state_dict()
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in stored.values()), (
        "no views of wide weights"
    )
    for record in records:
        block = denoiser.transformer_blocks[record.block]
        for linear in present(block, READERS[record.name]):
            assert linear.weight.shape == (linear.out_features, linear.in_features)
        for linear in present(block, WRITERS[record.name]):
            assert linear.weight.shape == (linear.out_features, linear.in_features)
            assert linear.bias.shape == (linear.out_features,)


def test_the_meta_device_gives_the_same_shapes(denoiser: nn.Module, source: Source) -> None:
    records = every_record(denoiser, 0.3)
    meta = meta_denoiser(source)
    for module in (denoiser, meta):
        shrink(module, SD3, records)
    assert all(parameter.is_meta for parameter in meta.parameters())
    shapes = {name: value.shape for name, value in denoiser.state_dict().items()}
    assert {name: value.shape for name, value in meta.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "change",
    [
        {"name": "heads"},
        {"name": ""},
        {"block": 99},
        {"block": -1},
        {"of": 7},
        {"kept": []},
        {"kept": [0, 0, 1]},
        {"kept": [-1, 0]},
        {"kept": [0, 10**6]},
        {"kept": [0, 2**70]},
    ],
    ids=str,
)
def test_records_that_do_not_fit_are_refused(tiny_sd3: Path, change: dict[str, object]) -> None:
    denoiser = load_denoiser(find_source(tiny_sd3), torch.float32)
    record = make_record(denoiser, 0, "attn", 0.5).model_copy(update=change)
    with pytest.raises(InputError, match="transformer_blocks"):
        shrink(denoiser, SD3, [record])


def test_the_number_past_the_last_unit_is_refused(tiny_sd3: Path) -> None:
    denoiser = load_denoiser(find_source(tiny_sd3), torch.float32)
    units = count_units(denoiser.transformer_blocks[0], "ff")
    record = GroupRecord(block=0, name="ff", kind="neurons", kept=[0, units], of=units)
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.ff"):
        shrink(denoiser, SD3, [record])


def test_a_group_cannot_be_shrunk_twice(tiny_sd3: Path) -> None:
    denoiser = load_denoiser(find_source(tiny_sd3), torch.float32)
    record = make_record(denoiser, 0, "ff", 0.5)
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.ff"):
        shrink(denoiser, SD3, [record, record])


def test_a_group_that_this_block_lacks_is_refused(tiny_sd3: Path) -> None:
    denoiser = load_denoiser(find_source(tiny_sd3), torch.float32)
    last = len(denoiser.transformer_blocks) - 1
    record = make_record(denoiser, 0, "ff_context", 0.5).model_copy(update={"block": last})
    with pytest.raises(InputError, match=rf"transformer_blocks\.{last}\.ff_context"):
        shrink(denoiser, SD3, [record])
