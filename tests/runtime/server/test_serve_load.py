"""`obsdiff bench --url` against a real server."""

from pathlib import Path

from cli import assert_sentence, call
from PIL import Image

from server import Server, add_key_file

FEW = ("--requests", 6, "--steps", 2, "--warmup", 1)


def test_every_request_of_every_level_reaches_the_server(server: Server, tmp_path: Path) -> None:
    drawn = server.metric("obsdiff_images_total", model="plain")
    plot = tmp_path / "load.png"
    levels = ("--clients", 1, "--clients", 3, "--rate", 50)
    result = call(
        "bench", "--url", server.url, *levels, *FEW, "--model", "plain", "--size", "48x32", "--plot", plot, "--json"
    )
    assert result.code == 0, result.err
    rows = result.json["results"]
    assert [(row["clients"], row["rate"]) for row in rows] == [(1, None), (3, None), (None, 50)]
    for row in rows:
        assert (row["requests"], row["answered"], row["errors"]) == (6, 6, {})
        assert 0 < row["median_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["seconds"] * 1e3
    assert server.metric("obsdiff_images_total", model="plain") == drawn + 1 + 3 * 6
    assert [line["n"] for line in server.logged("request") if line.get("model") == "plain"][-19:] == [1] * 19
    assert Image.open(plot).size > (600, 400)


def test_a_full_queue_is_counted_and_not_hidden(server: Server) -> None:
    flood = ("--rate", 1000, "--requests", 80, "--steps", 60)
    result = call("bench", "--url", server.url, *flood, "--json")
    assert result.code == 0, result.err
    (row,) = result.json["results"]
    assert row["errors"].keys() == {"429 queue_full"}
    assert row["answered"] + row["errors"]["429 queue_full"] == 80
    assert row["answered"] >= 12  # what the queue holds


def test_the_table_has_a_line_a_level(server: Server) -> None:
    result = call("bench", "--url", server.url, "--clients", 2, "--rate", 40, *FEW)
    header, *rows = (line for line in result.out.splitlines() if line.strip())
    assert header.split() == ["load", "requests", "answered", "median", "p90", "p99", "images/s", "errors"]
    assert [row.split("  ")[0] for row in rows] == ["2 clients", "40/s"]
    assert all(row.rstrip().endswith("none") for row in rows)


def test_what_the_server_refuses_is_one_sentence(server: Server) -> None:
    assert_sentence(call("bench", "--url", server.url, "--model", "gone"), 2, "404 model_not_found", "one-block, plain")
    assert_sentence(call("bench", "--url", server.url, "--size", "8x8"), 2, "400 invalid_size")


def test_a_key_opens_a_server_that_wants_one(graphless: Path, tmp_path: Path) -> None:
    keys = add_key_file(tmp_path, "sesame")
    locked = Server(graphless, "--api-key-file", keys)
    try:
        url = locked.ready().url
        assert_sentence(call("bench", "--url", url, *FEW), 2, "401 invalid_api_key")
        result = call("bench", "--url", url, "--api-key-file", keys, *FEW)
        assert result.code == 0, result.err
    finally:
        locked.kill()
