"""Which paths are one variant: by their last component, by their parents where two share it, by their recipe."""

from pathlib import Path

import pytest
import written
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.checkpoint import read_info
from obsdiff.errors import InputError
from obsdiff.export.bundle import read_manifest
from obsdiff.measure.results import read_result
from obsdiff.measure.variants import Found, find_reference, last_parts, name_variants

OTHER = {**written.RECIPE, "solver": "obs"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(*paths: str) -> Found:
    """What these paths hold."""
    found = Found()
    for path in paths:
        if info := read_info(Path(path)):
            found.checkpoints[path] = info
        elif (Path(path) / "manifest.json").exists():
            found.bundles[path] = read_manifest(Path(path))
        elif (Path(path) / "eval.json").exists():
            found.evals[path] = read_result(Path(path) / "eval.json")  # type: ignore[assignment]
        else:
            found.benches[path] = read_result(Path(path))  # type: ignore[assignment]
    return found


def test_the_last_component_makes_one_variant_of_a_checkpoint_its_bundle_and_its_results(here: Path) -> None:
    written.checkpoint(here / "pruned" / "2-4")
    written.bundle(here / "bundles" / "2-4")
    written.bench(here / "bench.json", {"fashion": 30, "bundles/2-4": 20, "/far/away/half/": 10})
    names = name_variants(find("pruned/2-4", "bundles/2-4", "bench.json"))
    assert names == {
        "pruned/2-4": "2-4",
        "bundles/2-4": "2-4",
        "fashion": "fashion",
        "/far/away/half/": "half",
    }


@pytest.mark.parametrize("kind", ["checkpoints", "bundles", "rows", "recipes"])
def test_where_two_share_it_the_parent_tells_them_apart(here: Path, kind: str) -> None:
    paths = ["a/x"]
    if kind != "bundles":
        written.checkpoint(here / "a" / "x")
    if kind == "checkpoints":
        paths.append(str(written.checkpoint(Path("b") / "x")))
    elif kind == "bundles":
        paths = [str(written.bundle(Path(folder) / "x")) for folder in "ab"]
    elif kind == "recipes":
        paths.append(str(written.bundle(Path("b") / "x", OTHER)))
    else:
        paths.append(str(written.bench(Path("bench.json"), {"a/x": 1, "b/x": 2, "y": 3})))
    names = name_variants(find(*paths))
    assert {names["a/x"], names["b/x"]} == {"a/x", "b/x"}
    assert names.get("y", "y") == "y"


def test_two_that_stay_alike_are_refused(here: Path) -> None:
    for folder in ("one", "two"):
        written.checkpoint(here / folder / "a" / "x")
    with pytest.raises(InputError, match="two different paths end in a/x"):
        name_variants(find("one/a/x", "two/a/x"))


def test_a_bundle_of_another_name_goes_with_its_checkpoint(here: Path) -> None:
    written.checkpoint(here / "pruned")
    written.checkpoint(here / "other", OTHER)
    written.bundle(here / "bundle")
    assert name_variants(find("pruned", "other", "bundle"))["bundle"] == "pruned"
    written.bundle(here / "second")
    names = name_variants(find("pruned", "bundle", "second"))  # both are of that recipe: neither is the one
    assert names == {"pruned": "pruned", "bundle": "bundle", "second": "second"}
    written.bundle(here / "bundles" / "pruned")
    names = name_variants(find("pruned", "bundle", "bundles/pruned"))
    assert names == {"pruned": "pruned", "bundle": "bundle", "bundles/pruned": "pruned"}
    written.bundle(here / "foreign", base={"name": "fashion", "sha256": "1" * 64})
    assert name_variants(find("pruned", "foreign"))["foreign"] == "foreign"


def test_a_dense_bundle_goes_with_its_model(here: Path) -> None:
    written.bundle(here / "bundle", None)
    written.evaluation(here / "quality", {"x": 0.1}, reference="fashion")
    found = find("bundle", "quality")
    assert name_variants(found)["bundle"] == "fashion"
    assert name_variants(find("bundle")) == {"bundle": "bundle"}
    assert find_reference(found, name_variants(found)) == "fashion"


def test_the_reference_is_that_of_eval_then_the_first_of_bench_then_a_dense_bundle(here: Path) -> None:
    written.bundle(here / "dense", None)
    written.checkpoint(here / "pruned")
    written.bench(here / "bench.json", {"first": 1, "dense": 2})
    written.evaluation(here / "quality", {"pruned": 0.1}, reference="model")
    for paths, wanted in (
        (["pruned"], None),
        (["pruned", "dense"], "dense"),
        (["dense", "bench.json"], "first"),
        (["bench.json", "dense", "quality"], "model"),
    ):
        found = find(*paths)
        assert find_reference(found, name_variants(found)) == wanted


def test_a_folder_without_a_name_has_that_of_where_it_is(here: Path) -> None:
    assert last_parts(".", 1) == here.name
    assert last_parts("a/../b/", 1) == "b"
    assert last_parts("/", 1) == "/"
    assert last_parts("x", 2) == "x"


PATHS = st.lists(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join), min_size=1, max_size=5, unique=True
)


@given(PATHS, PATHS)
def test_what_must_differ_never_has_one_name(checkpoints: list[str], rows: list[str]) -> None:
    info = written.make_info()
    bench = written.make_bench(dict.fromkeys(rows, 1.0))
    found = Found(checkpoints=dict.fromkeys(checkpoints, info), benches={"bench.json": bench})
    try:
        names = name_variants(found)
    except InputError:
        assert any(len({"/".join(p.split("/")[-2:]) for p in side}) < len(side) for side in (checkpoints, rows))
        return
    for side in (checkpoints, rows):
        assert len({names[path] for path in side}) == len(side)
    for path in set(checkpoints) & set(rows):
        assert names[path]
