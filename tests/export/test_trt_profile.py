"""Two engines timed in turn, layer by layer; the engines themselves need a GPU and TensorRT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obsdiff.export.evidence import files_of
from obsdiff.export.receipt import read_receipt
from obsdiff.export.stage import export
from obsdiff.export.trt_profile import WARM, Timed, interleave
from obsdiff.prune.stage import prune


def test_engines_run_in_turn_and_each_layer_gives_its_median() -> None:
    order: list[str] = []

    def engine(name: str, times: Iterator[float]) -> Timed:
        def run() -> dict[str, float]:
            order.append(name)
            return {f"{name}.gemm": next(times), f"{name}.rest": 1.0}

        return Timed([{"Name": f"{name}.gemm", "Metadata": "[ONNX Layer: a]", "TacticName": "x"}], run)

    warm = [900.0] * WARM  # the first calls do not count
    dense, sparse = interleave(
        [engine("dense", iter([*warm, 5.0, 3.0, 100.0])), engine("sparse", iter([*warm, 2.0, 2.5, 1.0]))], runs=3
    )
    assert order == ["dense", "sparse"] * (WARM + 3)
    assert dense == [
        {"Name": "dense.gemm", "Metadata": "[ONNX Layer: a]", "ms": 5.0},
        {"Name": "dense.rest", "Metadata": "", "ms": 1.0},
    ]
    assert [layer["ms"] for layer in sparse] == [2.0, 1.0]


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_tensorrt_engine_gives_a_whole_receipt(one_block_sd3: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"solver": "magnitude", "num_prompts": 1, "steps": 1, "packages": 1}
    prune(one_block_sd3, tmp_path / "pruned", pattern="2:4", **quick)
    bundle = tmp_path / "bundle"
    manifest = export(tmp_path / "pruned", bundle, precision="fp16", formats=("tensorrt",), device="cuda", profile=True)
    (engine,) = manifest.engines
    assert set(files_of(engine)) <= set(manifest.files)
    receipt = read_receipt(bundle, manifest)
    assert receipt
    assert receipt.summary.evidence.startswith("TensorRT")
    assert receipt.summary.sparse is not None
    assert receipt.summary.limit is not None
    assert receipt.summary.reached is not None
    assert all(layer.kernel != "unknown" for layer in receipt.layers if layer.eligible)
    assert sum(layer.dense_ms is not None for layer in receipt.layers) > len(receipt.layers) / 2
