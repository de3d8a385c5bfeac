"""Paths and backends: each pair that can run is loaded once, what cannot is told or refused."""

from pathlib import Path

import pytest

from obsdiff.errors import InputError
from obsdiff.measure.pairs import Pair, backend_list, check_paths, load_pairs
from obsdiff.progress import Progress


class Told(Progress):
    """Keeps the messages, and counts the work."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.done = 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count

    def message(self, text: str) -> None:
        if text.startswith("left out"):
            self.left_out.append(text)


def load(paths: list[Path | str], backends: list[str], told: Told) -> list[Pair]:
    return load_pairs(paths, backends, "cpu", {"num_inference_steps": 3}, told)


def test_every_path_runs_on_what_it_can(one_block_bundle: Path, graphless: Path, one_block_sd3: Path) -> None:
    told = Told()
    pairs = load([one_block_bundle, graphless, one_block_sd3], ["onnxruntime", "torch"], told)
    labels = [(pair.path, pair.backend) for pair in pairs]
    assert labels == [
        (one_block_bundle, "onnxruntime"),
        (one_block_bundle, "torch"),
        (graphless, "torch"),
        (one_block_sd3, "torch"),
    ]
    assert [pair.options["num_inference_steps"] for pair in pairs] == [3] * 4
    assert told.done == 6
    assert len(told.left_out) == 2
    assert f"{graphless} has no ONNX graph" in told.left_out[0]
    assert f"{one_block_sd3} is not a bundle" in told.left_out[1]


def test_auto_is_no_second_row_and_no_reason_to_leave_out(one_block_bundle: Path) -> None:
    told = Told()
    pairs = load([one_block_bundle], ["auto", "torch", "onnxruntime"], told)
    assert [(pair.asked, pair.backend) for pair in pairs] == [("torch", "torch"), ("onnxruntime", "onnxruntime")]
    pairs = load([one_block_bundle], ["auto", "torch"], told)
    assert [(pair.asked, pair.backend) for pair in pairs] == [("auto", "onnxruntime"), ("torch", "torch")]
    assert told.left_out == []


def test_a_path_that_runs_on_none_is_refused_though_others_do(one_block_bundle: Path, one_block_sd3: Path) -> None:
    with pytest.raises(InputError, match="is not a bundle"):
        load([one_block_bundle, one_block_sd3], ["onnxruntime"], Told())


def test_a_backend_is_a_name_or_several() -> None:
    assert backend_list("torch") == ["torch"]
    assert backend_list(("torch", "auto", "torch")) == ["torch", "auto"]
    with pytest.raises(InputError, match="--backend openvino: there are auto, torch"):
        backend_list(["torch", "openvino"])
    with pytest.raises(InputError, match="name one"):
        backend_list([])


def test_paths_are_looked_at_before_anything_is_loaded(tmp_path: Path, graphless: Path) -> None:
    check_paths(["fashion", graphless, "somebody/on-the-hub"], {})
    (tmp_path / "folder").mkdir()
    for path, words in (("nowhere", "does not exist"), (tmp_path / "folder", "no model_index.json")):
        with pytest.raises(InputError, match=words):
            check_paths(["fashion", path], {})
    with pytest.raises(InputError, match="height 200 is outside"):
        check_paths([graphless], {"height": 200})
