"""The small parts: keys, kept pictures, log lines."""

import json
import logging
from pathlib import Path

import pytest

from obsdiff.errors import InputError
from obsdiff.runtime.server.guard import read_keys
from obsdiff.runtime.server.logs import JsonFormatter
from obsdiff.runtime.server.pictures import Pictures


def test_keys_are_lines_that_are_no_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  one \r\nzwei\n")
    assert read_keys(path) == ["one", "zwei"]
    for content in (b"", b"# none\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="--api-key-file"):
            read_keys(path)


def test_pictures_are_kept_up_to_a_size_and_a_time() -> None:
    pictures = Pictures(limit=10)
    names = [pictures.add(bytes(4)) for _ in range(3)]
    assert len(set(names)) == 3
    assert [pictures.get(name) for name in names] == [None, bytes(4), bytes(4)]
    assert pictures.get("guess") is None
    assert Pictures(seconds=-1).add(b"x")
    old = Pictures(seconds=-1)
    assert old.get(old.add(b"x")) is None


def test_a_log_line_is_one_line_of_json() -> None:
    record = logging.makeLogRecord(
        {"name": "n", "levelno": 20, "levelname": "INFO", "msg": "a\n%s", "args": ("\ud800",)}
    )
    record.data = {"status": 200, "path": Path("x")}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) | {"time": ""} == {
        "time": "", "level": "info", "logger": "n", "message": "a\n\ud800", "status": 200, "path": "x",
    }  # fmt: skip
