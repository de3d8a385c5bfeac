"""benchmarks/paper_tables.py: its smallest run, an interrupted one, the mask alone, and who is said to be better."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALLEST = ("--only", "2:4", "--match", "magnitude|obs", "--images", "4", "--steps", "1", "--prompts", "2")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("paper_tables")


@pytest.fixture(scope="module")
def orders(tables: ModuleType) -> ModuleType:
    module: ModuleType = tables.orders
    return module


def run(tables: ModuleType, out: Path, *options: str) -> Any:
    """The exit code, or the sentence that it ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paper_tables.py", "--out", str(out), *options])
        with pytest.raises(SystemExit) as caught:
            tables.main()
    return caught.value.code


def test_an_interrupted_run_goes_on_and_makes_its_tables(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune, made, out = tables.prune, [], tmp_path / "tables.json"

    def counted(*args: Any, **options: Any) -> Any:
        if made == ["magnitude"] and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        made.append(options["solver"])
        return prune(*args, **options)

    monkeypatch.setattr(tables, "prune", counted)
    assert run(tables, out, *SMALLEST) == 130
    assert len(json.loads(out.read_text())["results"]) == 1
    assert run(tables, out, *SMALLEST, "--pictures", str(tmp_path / "pictures")) == 0
    assert made == ["magnitude", "obs"]
    state, text = json.loads(out.read_text()), out.with_suffix(".txt").read_text()
    assert [len(one["pictures"]["latent_error"].split()) for one in state["results"]] == [4, 4]
    assert all(0 < one["figures"]["latent_error"]["value"] < 1 for one in state["results"])
    assert all(one["nonzero"] < one["parameters"] for one in state["results"])
    assert capsys.readouterr().out.endswith(text)
    assert "4 pictures a row, 1 of them of pairs that the model never learned" in text
    assert "No frechet_distance: it needs at least 128 images, not 4: --images 128" in text
    assert "| 2:4 | the paper: obs before dsnot before wanda before magnitude | obs, magnitude | 1 of 1 agree |" in text
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"dense.png", "2-4-2-4-obs-0.png"}
    said = run(tables, out, *SMALLEST, "--steps", "2")
    assert said == f"error: {out} is no result of these settings and versions: choose another --out"


def test_options_that_cannot_be_are_refused_in_a_sentence(tables: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "tables.json"
    assert "--images at most 515" in run(tables, out, "--images", "516")
    assert run(tables, out, "--match", "nobody") == "error: --match nobody: no row is called so"
    assert "no regular expression" in run(tables, out, "--match", "(")
    for name in ("tables.txt", "nowhere/tables.json"):
        assert "name a .json file in a folder that is there" in run(tables, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_the_mask_alone_is_the_dense_weight_under_it(tables: ModuleType, tmp_path: Path) -> None:
    from obsdiff.checkpoint import denoiser_weights, read_masks
    from obsdiff.models.source import find_source
    from obsdiff.prune.stage import prune

    before, path = tmp_path / "pruned", tmp_path / "mask"
    options = {"pattern": "structured+2:4", "solver": "obs", "blocks": "1:2", "num_prompts": 2, "steps": 1}
    info = prune("fashion", before, packages=1, device="cpu", **options)
    shutil.copytree(before, path)
    tables.drop_compensation(path, info)
    dense = denoiser_weights(find_source("fashion").denoiser_path)
    found, old = (denoiser_weights(find_source(one).denoiser_path) for one in (path, before))
    masks = read_masks(path, info)
    for name, mask in masks.items():
        assert found[f"{name}.weight"].equal(dense[f"{name}.weight"] * mask)
    assert any(not found[f"{name}.weight"].equal(old[f"{name}.weight"]) for name in masks)
    others = [name for name in old if name.removesuffix(".weight") not in masks]
    assert all(found[name].equal(old[name]) for name in others)


def test_every_row_that_the_paper_ranks_is_there(tables: ModuleType, orders: ModuleType) -> None:
    rows: dict[tuple[str, str], set[str]] = {}
    for row in tables.make_rows(32, 12):
        rows.setdefault((row.table, row.group), set()).add(row.name)
    assert {table for table, _ in rows} == set(tables.TABLES)
    assert set(orders.PAPER) <= set(rows)
    for (table, group), names in rows.items():
        _, pairs = orders.claims(table, group)[0]
        assert {name for pair in pairs for name in pair} <= names
    assert orders.PAPER["2:4", "2:4"].order == ["obs", "dsnot", "wanda", "magnitude"]
    assert orders.PAPER["unstructured", "50 %"].order == ["obs", "wanda", "dsnot", "magnitude"]


def result(errors: list[float], hits: list[int], distance: tuple[float, float, float]) -> list[dict[str, Any]]:
    """One row's results of one calibration seed."""
    figures: dict[str, Any] = {
        "latent_error": {"value": sum(errors) / len(errors), "low": 0, "high": 1},
        "item_accuracy": {"value": sum(hits) / len(hits), "low": 0, "high": 1},
        "frechet_distance": dict(zip(("low", "value", "high"), distance, strict=True)),
    }
    pictures = {"latent_error": " ".join(map(str, errors)), "item_accuracy": " ".join(map(str, hits))}
    return [{"figures": figures, "pictures": pictures}]


def test_better_is_fewer_errors_and_more_hits_and_less_distance(orders: ModuleType) -> None:
    good = result([0.1, 0.2, 0.3, 0.1], [1, 1, 1, 1], (1, 2, 3))
    bad = result([0.2, 0.3, 0.5, 0.2], [0, 0, 0, 0], (4, 5, 6))
    unclear = result([0.0, 0.6, 0.0, 0.4], [1, 1, 0, 1], (2, 3, 4))
    for figure in orders.RANKED:
        assert orders.judge(good, bad, figure) is True
        assert orders.judge(bad, good, figure) is False
        assert orders.judge(unclear, good, figure) is None
    rows = {"a": good, "b": bad, "c": unclear}
    assert orders.verdict(rows, [("b", "a"), ("a", "c"), ("a", "gone")], "latent_error") == (
        "0 of 2 agree, 1 undecided, not: a before b"
    )
    assert orders.verdict(rows, [("a", "gone")], "latent_error") == ""


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_who_is_better_does_not_depend_on_who_is_asked_first(
    orders: ModuleType, errors: list[tuple[float, float]]
) -> None:
    one, other = (result(list(side), [1, 0], (0, 1, 2)) for side in zip(*errors, strict=True))
    said, turned = orders.judge(one, other, "latent_error"), orders.judge(other, one, "latent_error")
    assert said is None if turned is None else said is not turned
