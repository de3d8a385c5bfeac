"""Heads and neurons that one linear reads (FLUX's single blocks): pruned together, whichever goes first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obsdiff import checkpoint
from obsdiff.checkpoint import CheckpointInfo
from obsdiff.models import walk
from obsdiff.models.source import find_source, load_denoiser, meta_denoiser
from obsdiff.prune.calibration import Collector, run_batches
from obsdiff.prune.hessian import mean
from obsdiff.prune.packages import apart
from obsdiff.prune.stage import prune
from obsdiff.prune.structured import greedy_units, remove_magnitude, remove_obs

from .folders import weights_of
from .layers import make_layer
from .runs import make_run

OPTIONS: dict[str, Any] = {
    "pattern": "structured",
    "solver": "obs",
    "damping": 1e-3,
    "heads": 0.5,
    "neurons": 0.5,
    "packages": 1,
    "blocks": "2:3",  # the first single block alone
    "num_prompts": 8,
    "batch_size": 4,
    "steps": 3,
    "device": "cpu",
}
BLOCK = "single_transformer_blocks.0"
READERS = {"flux": f"{BLOCK}.proj_out", "flux2": f"{BLOCK}.attn.to_out"}
WIDTHS = {"flux": (32, 128), "flux2": (32, 96)}  # the reader's columns: of 4 heads, then of the neurons


@pytest.fixture(scope="module", params=list(READERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tiny_model: Any) -> Path:
    return Path(tiny_model(family))


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "pruned"
    prune(model, out, **OPTIONS)
    return out


def info_of(path: Path) -> CheckpointInfo:
    info = checkpoint.read_info(path)
    assert info
    return info


def left_columns(path: Path, family: str) -> Tensor:
    """int64: the columns of the reader whose units stay, by the records alone."""
    heads, neurons = info_of(path).groups
    assert (heads.name, neurons.name, heads.of, neurons.of) == ("attn", "mlp", 4, WIDTHS[family][1])
    size, start = WIDTHS[family][0] // 4, WIDTHS[family][0]
    return torch.tensor([h * size + i for h in heads.kept for i in range(size)] + [start + n for n in neurons.kept])


def hessian_of(model: Path, family: str, folder: Path) -> Tensor:
    """The reader's Hessian [in, in], float64, from the calibration that the prune ran."""
    run = make_run(model, folder, **OPTIONS)
    collector = Collector(run, [(READERS[family],)])
    with collector.listening():
        run_batches(run, collector)
    return mean(collector.hessians[(READERS[family],)]).hessian.double()


def refit(weight: Tensor, hessian: Tensor, left: Tensor, damping: float) -> Tensor:
    """The least-squares weight [out, in] on those columns, zero elsewhere."""
    ridge = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    result = torch.zeros_like(weight)
    result[:, left] = torch.linalg.solve(ridge[left][:, left], (weight @ ridge)[:, left].T).T
    return result


def test_both_groups_in_one_package_are_one_least_squares_fit(
    model: Path, family: str, pruned: Path, tmp_path: Path
) -> None:
    reader, left, damping = READERS[family], left_columns(pruned, family), OPTIONS["damping"]
    hessian = hessian_of(model, family, tmp_path)
    weight, got = (weights_of(path)[f"{reader}.weight"].double() for path in (model, pruned))

    def lost(new: Tensor) -> float:
        return float(torch.trace((new - weight) @ hessian @ (new - weight).T))

    best = refit(weight, hessian, left, 1e-9)
    assert lost(best) <= lost(got) < 1.001 * lost(best)
    assert lost(best) < 0.9 * lost(weight * (got != 0)), "there was something to make up for"
    # To round-off: damping is a share of the mean diagonal, and the second solve sees the columns that the first left.
    heads, neurons = left[left < WIDTHS[family][0]], torch.arange(WIDTHS[family][0], len(hessian))
    first = torch.cat([heads, neurons])
    wanted = refit(weight, hessian, first, damping)
    wanted[:, first] = refit(
        wanted[:, first], hessian[first][:, first], torch.isin(first, left).nonzero().flatten(), damping
    )
    assert (got - wanted).norm() < 1e-4 * wanted.norm()


def test_masks_and_weights_agree(model: Path, family: str, pruned: Path) -> None:
    info, left = info_of(pruned), left_columns(pruned, family)
    checkpoint.verify(find_source(pruned), info)
    masks = checkpoint.read_masks(pruned, info)
    kept = walk.kept_entries(meta_denoiser(find_source(model)), find_source(model).spec, info.groups)
    assert masks.keys() == kept.keys()
    for name, mask in masks.items():
        wanted = torch.zeros_like(mask)
        wanted[kept[name][0][:, None], kept[name][1]] = True
        assert torch.equal(mask, wanted), name
        weight = weights_of(pruned)[f"{name}.weight"]
        assert weight[mask].count_nonzero() > 0.99 * mask.sum()
    assert torch.equal(masks[READERS[family]].any(0).nonzero().flatten(), left)


def test_what_is_not_pruned_is_as_it_was(model: Path, pruned: Path) -> None:
    before, after = weights_of(model), weights_of(pruned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(f"{BLOCK}.") for name in changed)


@pytest.mark.parametrize("pattern", ["structured", "structured+2:4"])
def test_more_packages_and_one_give_the_same_shapes(
    model: Path, family: str, pruned: Path, pattern: str, tmp_path: Path
) -> None:
    prune(model, tmp_path / "out", **{**OPTIONS, "pattern": pattern, "packages": 4})
    info = info_of(tmp_path / "out")
    checkpoint.verify(find_source(tmp_path / "out"), info)
    assert [len(group.kept) for group in info.groups] == [len(group.kept) for group in info_of(pruned).groups]
    assert weights_of(tmp_path / "out")[f"{READERS[family]}.weight"].any(0).sum() <= len(left_columns(pruned, family))


def test_what_goes_first_stays_gone(model: Path, family: str, tmp_path: Path) -> None:
    """The neurons' solve must not bring a head's columns back, whatever the solver."""
    prune(model, tmp_path / "out", **{**OPTIONS, "solver": "magnitude", "damping": None})
    before, after = (weights_of(path)[f"{READERS[family]}.weight"] for path in (model, tmp_path / "out"))
    left = left_columns(tmp_path / "out", family)
    wanted = torch.zeros_like(before)
    wanted[:, left] = before[:, left]
    assert torch.equal(after, wanted)


def test_a_stream_prunes_both_groups(tiny_model: Any, tmp_path: Path) -> None:
    model = Path(tiny_model("flux"))  # FLUX.2 forms no chain
    options = {**OPTIONS, "calibration": "stream", "blocks": ":", "packages": None}
    prune(model, tmp_path / "out", **options)
    info = info_of(tmp_path / "out")
    checkpoint.verify(find_source(tmp_path / "out"), info)
    assert [(g.block, g.name) for g in info.groups] == [
        *((block, name) for block in (0, 1) for name in ("attn", "ff", "ff_context")),
        *((block, name) for block in (2, 3) for name in ("attn", "mlp")),
    ]
    assert all(len(group.kept) == group.of // 2 for group in info.groups)


def test_stages_that_share_a_linear_are_not_solved_side_by_side(model: Path) -> None:
    denoiser = load_denoiser(find_source(model))
    stages = walk.group_stages(denoiser, find_source(model).spec, "2:4")
    assert [[stage.name.removeprefix("single_transformer_blocks.") for stage in run] for run in apart(stages, 2)] == [
        ["0.attn"],
        ["0.mlp", "1.attn"],
        ["1.mlp"],
    ]


problems = st.fixed_dictionaries(
    {
        "before": st.integers(0, 5),
        "size": st.integers(1, 3),
        "units": st.integers(2, 5),
        "after": st.integers(0, 5),
        "seed": st.integers(0, 1000),
    }
)


def make_problem(before: int, size: int, units: int, after: int, seed: int) -> tuple[Tensor, Tensor, range]:
    """weight and Hessian in float64, and the columns of the units among others."""
    layer = make_layer(6, before + size * units + after, seed)
    return layer.weight.double(), layer.hessian.double(), range(before, before + size * units)


def schur(hessian: Tensor, part: Tensor) -> Tensor:
    """The Hessian of those columns when all others make up for what they lose."""
    other = torch.tensor([i for i in range(len(hessian)) if i not in set(part.tolist())], dtype=torch.int64)
    cross = hessian[other][:, part]
    return hessian[part][:, part] - cross.T @ torch.linalg.solve(hessian[other][:, other], cross)


@settings(deadline=None, max_examples=60)
@given(problem=problems, keep=st.integers(1, 5))
def test_units_among_other_columns_are_a_smaller_problem_of_their_own(problem: dict[str, int], keep: int) -> None:
    """The same units go, and cost the same, as where the other columns are solved for and left out."""
    weight, hessian, span = make_problem(**problem)
    units, part = problem["units"], torch.arange(span.start, span.stop)
    keep = min(keep, units)
    alive, losses = greedy_units([weight], [hessian], units, keep, [span])
    inner = schur(hessian, part) if len(part) < len(hessian) else hessian
    wanted, inner_losses = greedy_units([weight[:, part]], [inner], units, keep)
    energies = [torch.trace(w @ h @ w.T) for w, h in ((weight, hessian), (weight[:, part], inner))]
    assert torch.equal(alive, wanted)
    assert torch.allclose(
        torch.tensor(losses) * energies[0], torch.tensor(inner_losses) * energies[1], rtol=1e-3
    )  # by two roads through near-singular blocks


@settings(deadline=None, max_examples=60)
@given(problem=problems, keep=st.integers(1, 5), data=st.data())
def test_where_the_other_columns_lie_does_not_matter(problem: dict[str, int], keep: int, data: Any) -> None:
    weight, hessian, span = make_problem(**problem)
    weight, hessian, keep = weight.float(), hessian.float(), min(keep, problem["units"])
    others = data.draw(st.permutations([i for i in range(len(hessian)) if i not in span]))
    place = data.draw(st.integers(0, len(others)))
    order = torch.tensor([*others[:place], *span, *others[place:]])
    moved = range(place, place + len(span))
    for remove in (remove_obs, remove_magnitude):
        one = remove([weight], [hessian], problem["units"], keep, spans=[span])
        two = remove([weight[:, order]], [hessian[order][:, order]], problem["units"], keep, spans=[moved])
        assert one.kept == two.kept
        assert (one.weights[0][:, order] - two.weights[0]).norm() <= 1e-3 * one.weights[0].norm()


@settings(deadline=None, max_examples=60)
@given(problem=problems, keep=st.integers(1, 5))
def test_only_columns_of_units_that_go_become_zero(problem: dict[str, int], keep: int) -> None:
    weight, hessian, span = make_problem(**problem)
    units, size = problem["units"], problem["size"]
    removal = remove_obs([weight.float()], [hessian.float()], units, min(keep, units), spans=[span])
    gone = [u for u in range(units) if u not in removal.kept]
    zero = {span.start + u * size + i for u in gone for i in range(size)}
    assert set((~removal.weights[0].any(0)).nonzero().flatten().tolist()) == zero
