"""Packages: all stages, in order, as even as they go."""

from hypothesis import given
from hypothesis import strategies as st

from obsdiff.models.walk import Stage
from obsdiff.prune.packages import by_block, cut


def make_stages(count: int, a_block: int = 4) -> list[Stage]:
    return [
        Stage(k // a_block, ((f"blocks.{k // a_block}.{k}.q", f"blocks.{k // a_block}.{k}.k"),)) for k in range(count)
    ]


@given(st.integers(1, 60), st.integers(1, 80))
def test_a_cut_loses_nothing_keeps_the_order_and_is_even(count: int, packages: int) -> None:
    stages = make_stages(count)
    found = cut(stages, packages)
    assert len(found) == min(packages, count)
    assert [stage for package in found for stage in package] == stages
    sizes = [len(package) for package in found]
    assert max(sizes) - min(sizes) <= 1


def test_what_runs_in_parallel_stays_together() -> None:
    stages = make_stages(3)
    assert [[stage.linears for stage in package] for package in cut(stages, 99)] == [[s.linears] for s in stages]


@given(st.integers(1, 40), st.integers(1, 5))
def test_by_block_every_block_is_a_package(count: int, a_block: int) -> None:
    stages = make_stages(count, a_block)
    found = by_block(stages)
    assert [stage for package in found for stage in package] == stages
    assert [{stage.block for stage in package} for package in found] == [{k} for k in range(-(-count // a_block))]
