"""Results on disk: what is read of them, and one sentence for what is damaged, foreign or hostile."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import written
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from obsdiff.errors import InputError
from obsdiff.measure.results import Bench, Eval, fit, printable, read_picture, read_result


def test_a_bench_with_and_without_its_kind(tmp_path: Path) -> None:
    path = written.bench(tmp_path / "bench.json", {"dense": 20, "half": 10})
    value = json.loads(path.read_text())
    assert "kind" not in value
    found = read_result(path)
    assert isinstance(found, Bench)
    assert [(row.path, row.median_ms) for row in found.results] == [("dense", 20), ("half", 10)]
    assert read_result(written.write(path, {**value, "kind": "bench", "more": [1]})) == found


def test_an_eval(tmp_path: Path) -> None:
    found = read_result(written.evaluation(tmp_path / "quality", {"half": None}) / "eval.json")
    assert isinstance(found, Eval)
    assert found.results[0].metrics["latent_mse"].value is None
    assert (found.settings.prompts, found.settings.seeds) == (list(written.PROMPTS), [5, 6, 7])


def test_numbers_that_are_none_and_values_that_are_no_text_are_read(tmp_path: Path) -> None:
    folder = written.evaluation(tmp_path / "quality", {"half": float("nan")}, environment={"gpus": [1, {"a": 2}]})
    found = read_result(folder / "eval.json")
    assert isinstance(found, Eval)
    assert found.results[0].metrics["latent_mse"].value is None
    assert found.environment == {"gpus": '[1, {"a": 2}]'}


def broken(**changes: Any) -> dict[str, Any]:
    row = written.make_bench({"x": 1}).results[0].model_dump()
    return {"environment": {}, "settings": {}, "results": [{**row, **changes}]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "JSON of another kind"),
        ({"kind": "load", "results": []}, "JSON of another kind"),
        ({"kind": ["bench"]}, "JSON of another kind"),
        ({"schema_version": 1}, "not a result of obsdiff bench PATH...: environment: Field required"),
        (broken(median_ms=0), "results.0.median_ms: Input should be greater than 0"),
        (broken(median_ms=float("inf")), "results.0.median_ms: Input should be a finite number"),
        (broken(path=""), "results.0.path"),
        ({**broken(), "results": []}, "results: List should have at least 1 item"),
        ({"kind": "eval"}, "not a result of obsdiff eval: environment: Field required"),
    ],
)
def test_what_is_no_result_is_one_sentence(tmp_path: Path, value: Any, words: str) -> None:
    path = written.write(tmp_path / "x.json", value)
    with pytest.raises(InputError) as raised:
        read_result(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = written.bench(tmp_path / "bench.json", {"dense": 20})
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InputError, match=r"bench\.json cannot be read as JSON"):
        read_result(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": ["a"], "seeds": [1, 2]}, "1 prompts and 2 seeds"),
        ({"prompts": ["a"], "seeds": [1]}, "names 3 pictures of dense for 1 prompts"),
        ({"prompts": [], "seeds": []}, "settings.prompts"),
    ],
)
def test_an_eval_whose_counts_do_not_agree_is_refused(tmp_path: Path, settings: Any, words: str) -> None:
    folder = written.evaluation(tmp_path / "quality", {"half": 0.1}, settings=settings)
    with pytest.raises(InputError, match=words):
        read_result(folder / "eval.json")


def test_pictures_come_in_rgb_and_no_larger_than_they_are_shown(tmp_path: Path) -> None:
    Image.new("RGBA", (2000, 1000), (10, 20, 30, 5)).save(tmp_path / "a.png")
    picture = read_picture(tmp_path, "a.png", tmp_path)
    assert (picture.mode, picture.size) == ("RGB", (512, 256))
    assert fit(Image.new("L", (4, 4))).size == (4, 4)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "linked/secret.png"])
def test_a_picture_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "quality"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(tmp_path, folder / "linked")
    with pytest.raises(InputError, match=r"eval\.json: the picture .* lies outside of"):
        read_picture(folder, name, folder / "eval.json")


def test_a_missing_damaged_or_foreign_picture_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 50).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "bitmap.png", format="BMP")
    for name, words in (
        *(("gone.png", "is missing"), ("cut.png", "cannot be read"), ("text.png", "cannot be read")),
        *(("folder.png", "cannot be read"), ("bitmap.png", "cannot be read"), ("a\0b.png", "cannot be read")),
    ):
        with pytest.raises(InputError, match=words):
            read_picture(tmp_path, name, tmp_path / "eval.json")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"good\.png cannot be read: .*decompression bomb"):
        read_picture(tmp_path, "good.png", tmp_path / "eval.json")


@given(
    st.recursive(st.text() | st.none() | st.floats(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_whatever_was_read_can_be_written(value: Any) -> None:
    json.dumps(printable(value), ensure_ascii=False).encode()
    assert printable("größe\n\tok") == "größe\n\tok"
    assert printable({"a\ud800": ["\0"]}) == {"a\ufffd": ["\ufffd"]}
