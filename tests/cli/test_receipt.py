"""The receipt on the command line: shown by inspect, a condition of export; and prunes only where sparse is faster."""

import re
from pathlib import Path

import pytest

from cli import assert_sentence, call
from obsdiff.export.bundle import open_bundle

from .conftest import Journey


def test_inspect_shows_the_receipt_of_a_bundle(journey: Journey) -> None:
    found = call("inspect", journey.bundle, "--json").json["receipt"]
    assert found["summary"]["layers"] == len(found["layers"])
    assert found["summary"]["valid"] == 93
    table = call("inspect", journey.bundle)
    assert table.code == 0
    assert f"{found['sentence']}.\n" in table.out
    assert "(no engine that tells was built here)" in found["sentence"]
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in table.out.splitlines() if line.strip()}
    for layer in found["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        assert rows[layer["name"]][1:3] == [shape, str(layer["rows"])]
        assert rows[layer["name"]][-1] == layer["reason"]
    assert "fp32: sparse tensor cores take 2:4 weights in fp16" in rows["transformer_blocks.0.attn.to_q"][-1]
    assert rows["proj_out"][-1] == "dense weights"


def test_a_gate_that_is_not_met_is_exit_code_3_and_the_bundle_is_there(one_block_sd3: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    result = call("export", one_block_sd3, bundle, "--require-sparse", "90%")
    assert_sentence(result, 3, "--require-sparse 90%: none of the", "products has 2:4 weights", "--pattern 2:4")
    assert open_bundle(bundle).formats
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("share", ["all", "0%", "120%"])
def test_what_is_no_share_is_refused_before_anything_is_loaded(tmp_path: Path, share: str) -> None:
    result = call("export", "fashion", tmp_path / "bundle", "--require-sparse", share)
    assert_sentence(result, 2, f"--require-sparse {share}", "90%")
    assert not list(tmp_path.iterdir())


def test_profile_needs_tensorrt(tmp_path: Path) -> None:
    assert_sentence(call("export", "fashion", tmp_path / "bundle", "--profile"), 2, "--format tensorrt")
    assert not list(tmp_path.iterdir())


def test_only_faster_needs_a_gpu_or_a_table(one_block_sd3: Path, tmp_path: Path) -> None:
    command = ("prune", one_block_sd3, tmp_path / "out", "--device", "cpu", "--only-faster")
    assert_sentence(call(*command), 2, "CUDA GPU", "--gemm-table FILE")
    (tmp_path / "table.json").write_text("{}")
    assert_sentence(call(*command, "--gemm-table", tmp_path / "table.json"), 2, "table.json is no table of products")
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
