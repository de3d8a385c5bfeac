"""Models that load and that no bundle can be made of."""

import json
import shutil
from pathlib import Path

import pytest

from obsdiff.errors import InputError
from obsdiff.export.ranges import make_axes
from obsdiff.export.stage import export
from obsdiff.models.source import find_source


def test_a_file_that_no_bundle_may_hold_is_named(one_block_sd3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(one_block_sd3, tmp_path / "model")
    (model / "a:b.txt").write_text("stray")
    with pytest.raises(InputError, match=r"a file of the model cannot be put into a bundle: the path 'a:b\.txt'"):
        export(model, tmp_path / "bundle", formats=())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("tokens", [0, 600, "twelve", 1.5])
def test_a_prompt_length_that_the_family_cannot_have_is_refused(
    one_block_sd3: Path, tmp_path: Path, tokens: object
) -> None:
    model = shutil.copytree(one_block_sd3, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"prompt_tokens": tokens}))
    with pytest.raises(InputError, match=r"generation_config\.json: prompt_tokens is .* not a number from 1 to 589"):
        make_axes(find_source(model), "1:1:1", None)
