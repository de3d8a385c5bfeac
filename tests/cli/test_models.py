"""obsdiff models: what is verified comes from the tests, and the README says the same."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from cli import call
from obsdiff.cli.models import FILE
from obsdiff.export.stage import FORMATS
from obsdiff.models import FAMILIES
from obsdiff.runtime.backends import BACKENDS

ROOT = Path(__file__).parents[2]
STALE = "run python benchmarks/families.py"


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("families")


def test_what_is_verified_is_what_the_tests_are_parametrized_over(families: ModuleType) -> None:
    assert FILE.read_text(encoding="utf-8") == families.write(), STALE


def test_the_readme_has_the_table(families: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == families.with_table(readme), STALE


def test_every_family_has_a_tiny_pipeline() -> None:
    there = {path.stem for path in (ROOT / "tests" / "tiny").glob("*.py")} | {"sd3"}  # which conftest.py makes
    verified = json.loads(FILE.read_text(encoding="utf-8"))
    for spec in FAMILIES.values():
        assert spec.family in there
        assert verified[spec.family]["tiny"], f"{spec.family}: {STALE}"


def test_a_family_that_no_test_knows_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from obsdiff.cli import models

    (tmp_path / "families.json").write_text("{}")
    monkeypatch.setattr(models, "FILE", tmp_path / "families.json")
    assert {models.cells(row)[-1] for row in models.rows()} == {"nothing yet"}


def test_rows_say_what_can_be_done_with_a_family() -> None:
    rows = {row["family"]: row for row in call("models", "--json").json}
    assert rows["sd3"]["patterns"] == ["unstructured", "N:M", "structured (heads and neurons)"]
    assert rows["sd3"]["formats"] == list(FORMATS)
    assert rows["sd3"]["backends"] == list(BACKENDS)
    assert rows["sd3"]["verified"]["block"] == ["SD3-medium (1536 wide)", "SD3.5-large (2432 wide)"]
    assert rows["sd3"]["verified"]["whole"]


def test_a_skipped_family_is_not_verified(families: ModuleType) -> None:
    @pytest.mark.parametrize("family", ["a", pytest.param("b", marks=pytest.mark.skip)])
    def case(family: str) -> None:
        """Parametrized as the journeys are."""

    assert families.parameters(case) == {"a"}
