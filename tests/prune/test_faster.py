"""Pruning only where it pays: which layers stay dense, what is recorded, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from obsdiff import gemm_times
from obsdiff.checkpoint import WEIGHTS, CheckpointInfo
from obsdiff.errors import InputError
from obsdiff.export.inspect import inspect
from obsdiff.files import write_json
from obsdiff.gemm_times import GemmTable, GemmTime
from obsdiff.models.source import find_source
from obsdiff.progress import Progress
from obsdiff.prune import faster
from obsdiff.prune.faster import keep_dense
from obsdiff.prune.plan import plan
from obsdiff.prune.recipe import Recipe, make_recipe
from obsdiff.prune.solvers.patterns import NM, is_nm
from obsdiff.prune.stage import prune

QUICKEST: dict[str, Any] = {"solver": "magnitude", "num_prompts": 1, "steps": 1, "packages": 1, "device": "cpu"}


def table(recipe: Recipe, source: Any, sparse: Any) -> GemmTable:
    """A table of all products of the model; `sparse` gives the milliseconds of a shape [out, in] where dense is 1."""
    entries = {
        shape: GemmTime(rows=shape[0], shape=shape[1:], dtype="float16", dense_ms=1.0, sparse_ms=sparse(shape[1:]))
        for shape in faster.product_shapes(source, recipe).values()
    }
    return GemmTable(device="NVIDIA Test", driver="1", cuda="13", torch="2", entries=tuple(entries.values()))


@pytest.fixture
def file(one_block_sd3: Path, tmp_path: Path) -> Path:
    """A table in which only the FFN's first linears, 128 by 32, are faster sparse."""
    source = find_source(one_block_sd3)
    made = table(make_recipe(source, QUICKEST), source, lambda shape: 0.6 if shape == (128, 32) else 1.1)
    write_json(tmp_path / "table.json", made.model_dump(mode="json"))
    return tmp_path / "table.json"


def run(model: Path, out: Path, **options: Any) -> CheckpointInfo:
    return prune(model, out, pattern="2:4", only_faster=True, **QUICKEST, **options)


def test_only_the_winners_are_pruned_and_all_is_recorded(one_block_sd3: Path, file: Path, tmp_path: Path) -> None:
    info = run(one_block_sd3, tmp_path / "out", gemm_table=file)
    names = {layer.name for layer in info.layers}
    assert names == {f"transformer_blocks.0.{part}" for part in ("ff.net.0.proj",)}
    left = info.recipe["left_dense"]
    assert len(left) > 3
    assert not names & set(left)
    before = load_file(one_block_sd3 / "transformer" / WEIGHTS)
    after = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    for name in names:
        assert is_nm(after[f"{name}.weight"] != 0, NM(2, 4))
    assert all(torch.equal(before[name], after[name]) for name in before if name.removesuffix(".weight") not in names)
    recorded = GemmTable.model_validate(info.recipe["gemm_table"])
    assert recorded.device == "NVIDIA Test"
    found = inspect(tmp_path / "out")
    assert found["about"]["left dense"] == f"{len(left)} layers: no faster on NVIDIA Test"
    assert found["gemms"] == info.recipe["gemm_table"]
    again = run(one_block_sd3, tmp_path / "out", gemm_table=file)
    assert again == info, "it is finished already"


def test_without_a_gpu_or_a_table_it_is_refused_and_nothing_is_left(one_block_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--only-faster: sparse products .* the device is cpu.*; --gemm-table FILE"):
        run(one_block_sd3, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_prune_that_goes_on_goes_on_with_the_times_that_it_began_with(
    one_block_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(one_block_sd3)
    calls = []

    def measure(*_args: Any) -> GemmTable:
        calls.append(1)
        made = table(make_recipe(source, QUICKEST), source, lambda shape: 0.5 + len(calls) / 10)
        return made.model_copy(update={"device": f"measured {len(calls)}"})

    monkeypatch.setattr(faster, "measure_gemms", measure)
    first = run(one_block_sd3, tmp_path / "out")
    second = run(one_block_sd3, tmp_path / "out")
    assert calls == [1]
    assert first == second
    third = run(one_block_sd3, tmp_path / "out", restart=True)
    assert third.recipe["gemm_table"]["device"] == "measured 2"


def test_a_size_that_was_not_measured_is_named(one_block_sd3: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \d+ rows times .* at 64×64 pixels: measure it there at this size"):
        run(one_block_sd3, tmp_path / "out", gemm_table=file, height=64, width=64)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_where_nothing_is_faster_there_is_nothing_to_prune(one_block_sd3: Path, tmp_path: Path) -> None:
    source = find_source(one_block_sd3)
    slow = table(make_recipe(source, QUICKEST), source, lambda shape: 1.25)
    with pytest.raises(InputError, match=r"none of the \d+ layers is faster .* on NVIDIA Test \(the best takes 0\.80"):
        run(one_block_sd3, tmp_path / "out", gemm_table=slow)
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_asked_for_each_product_once(one_block_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(one_block_sd3)
    head = GemmTable(device="NVIDIA Test", driver="1", cuda="13", torch="2", entries=())
    monkeypatch.setattr(gemm_times, "_describe", lambda device: head)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    timed: list[int] = []

    def timer(functions: Any) -> list[float]:
        timed.append(len(functions))
        return [1.0, 0.5][: len(functions)]

    recipe = make_recipe(source, {**QUICKEST, "pattern": "2:4", "only_faster": True})
    made = keep_dense(source, recipe, None, Progress(), timer)
    assert made.gemm_table
    assert len(timed) == len(made.gemm_table.entries) == len(set(faster.product_shapes(source, recipe).values()))
    assert made.left_dense == ()
    assert plan(source, made) == plan(source, recipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only_faster": True, "pattern": "1:4"}, "--only-faster is for --pattern 2:4, not 1:4"),
        ({"only_faster": True, "pattern": "structured"}, "--only-faster is for --pattern 2:4"),
        ({"gemm_table": "FILE"}, "--gemm-table is an option of --only-faster"),
        ({"only_faster": True, "gemm_table": "nothing.json"}, r"nothing\.json is missing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    one_block_sd3: Path, file: Path, options: dict[str, Any], words: str
) -> None:
    given = {name: str(file) if value == "FILE" else value for name, value in options.items()}
    with pytest.raises(InputError, match=words):
        make_recipe(find_source(one_block_sd3), {**QUICKEST, **given})
