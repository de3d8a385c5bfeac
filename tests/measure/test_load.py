"""The load generator: what it sends, how it counts, and when; against servers that behave, refuse and fall silent."""

import _thread
import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.measure.arrivals import arrivals
from obsdiff.measure.load import (
    CAPTIONS,
    Level,
    Sample,
    check_plot,
    find_endpoint,
    load_test,
    plot_load,
    read_key,
    run_level,
    summarise,
)

PICTURE = {"created": 1, "data": [{"b64_json": "AAAA"}]}
FULL = {"error": {"message": "the queue is full", "type": "x", "param": None, "code": "queue_full"}}


class Endpoint(BaseHTTPRequestHandler):
    """Answers as `script` says, the last entry for ever; remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    script: ClassVar[list[tuple[int, Any]]] = []
    asked: ClassVar[list[tuple[str, str | None, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        status, answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if status == 0:  # the connection is cut
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.script[:], Endpoint.asked[:] = [(200, PICTURE)], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_it_asks_for_the_shipped_captions_with_what_was_given_and_nothing_else(endpoint: str) -> None:
    result = load_test(
        endpoint, clients=[1], rates=[500], requests=3, warmup=2, key="sesame", model="m", size="48x32", other=None
    )
    captions = CAPTIONS.read_text().splitlines()
    level = captions[:3]
    assert [body["prompt"] for *_, body in Endpoint.asked[:5]] == [captions[0], captions[0], *level]
    assert sorted(body["prompt"] for *_, body in Endpoint.asked[5:]) == sorted(level)
    for path, key, body in Endpoint.asked:
        assert (path, key) == ("/v1/images/generations", "Bearer sesame")
        assert body.items() >= {"n": 1, "model": "m", "size": "48x32"}.items()
        assert body.keys() == {"prompt", "n", "model", "size"}
    assert "sesame" not in json.dumps(result)
    assert [(row["clients"], row["rate"]) for row in result["results"]] == [(1, None), (None, 500)]
    assert all((row["requests"], row["answered"], row["errors"]) == (3, 3, {}) for row in result["results"])
    assert result["interrupted"] is False


def test_errors_are_counted_by_kind_and_have_no_latency(endpoint: str) -> None:
    Endpoint.script[:] = [
        *((200, PICTURE), (429, FULL), (429, FULL), (503, b"<html>")),
        *((200, {"data": []}), (0, None), (500, [1]), (200, PICTURE)),
    ]
    (row,) = load_test(endpoint, requests=8)["results"]
    assert row["errors"] == {
        "429 queue_full": 2,
        "503 Service Unavailable": 1,
        "200 without a picture": 1,
        "connection: RemoteProtocolError": 1,
        "500 Internal Server Error": 1,
    }
    assert (row["requests"], row["answered"], len(row["latencies_ms"])) == (8, 2, 2)


def test_where_nothing_was_answered_there_are_no_percentiles(endpoint: str) -> None:
    Endpoint.script[:] = [(200, PICTURE), (429, FULL)]
    (row,) = load_test(endpoint, requests=2)["results"]
    assert (row["median_ms"], row["images_per_second"], row["answered"]) == (None, 0, 0)


@pytest.mark.parametrize(
    ("status", "answer", "kind", "words"),
    [
        (401, {"error": {"message": "a key is needed", "code": "invalid_api_key"}}, InputError, "401 invalid_api_key"),
        (404, b"nothing here", InputError, "404 Not Found"),
        (429, FULL, ObsdiffError, "429 queue_full: the queue is full"),
        (500, b"\xff\xfe", ObsdiffError, "500 Internal Server Error"),
        (200, {"object": "list"}, ObsdiffError, "200 without a picture"),
        (0, None, ObsdiffError, "cannot be reached"),
    ],
)
def test_the_first_refusal_ends_it(endpoint: str, status: int, answer: Any, kind: type, words: str) -> None:
    Endpoint.script[:] = [(status, answer)]
    with pytest.raises(ObsdiffError, match=words) as refused:
        load_test(endpoint, requests=5, warmup=0)
    assert type(refused.value) is kind
    assert len(Endpoint.asked) == 1


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ObsdiffError, match=r"127\.0\.0\.1:1/v1/images/generations cannot be reached"):
        load_test("http://127.0.0.1:1", requests=1)


@pytest.mark.parametrize(("clients", "requests"), [(1, 5), (3, 10), (8, 4)])
def test_every_client_waits_for_its_answer(clients: int, requests: int) -> None:
    active: set[int] = set()
    most, order = 0, []

    async def ask(k: int) -> None:
        nonlocal most
        active.add(k)
        order.append(k)
        most = max(most, len(active))
        await asyncio.sleep(0.002)
        active.remove(k)

    samples: list[Sample] = []
    asyncio.run(run_level(Level(clients=clients), requests, 0, ask, samples.append))
    assert most == min(clients, requests)
    assert order == list(range(requests))
    assert len(samples) == requests


def test_arrivals_do_not_wait_and_count_from_when_they_were_due() -> None:
    samples: list[Sample] = []
    running = 0

    async def main() -> None:
        everyone = asyncio.Event()

        async def ask(_k: int) -> None:
            nonlocal running
            running += 1
            if running == 20:
                everyone.set()
            await everyone.wait()  # a loop that waited for answers would never get to the last one

        await asyncio.wait_for(run_level(Level(rate=2000), 20, 3, ask, samples.append), 60)

    asyncio.run(main())
    assert sorted(sample.start for sample in samples) == arrivals(2000, 20, 3)
    assert all(sample.end >= sample.start for sample in samples)


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(4.0, 20_000, 1)
    gaps = np.diff([0.0, *times])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential, as its mean
    counts = np.histogram(times, np.arange(0, int(times[-1])))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
    assert arrivals(4.0, 5, 1) == times[:5] != arrivals(4.0, 5, 2)


def test_a_summary_is_what_numpy_says() -> None:
    samples = [Sample(k * 0.5, k * 0.5 + 0.1 * (k + 1)) for k in range(9)] + [Sample(0.2, 9.0, "timeout")]
    row = summarise(Level(clients=2), samples)
    times = [100.0 * (k + 1) for k in range(9)]
    assert row["latencies_ms"] == pytest.approx(times)
    for name, q in (("median_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        assert row[name] == pytest.approx(np.percentile(times, q))
    assert (row["seconds"], row["images_per_second"], row["errors"]) == (9.0, 1.0, {"timeout": 1})


def test_ctrl_c_keeps_what_was_measured(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = 0
    post = Endpoint.do_POST

    def stop(self: Endpoint) -> None:
        nonlocal answered
        answered += 1
        if answered == 6:  # the warm-up, and 4 were answered
            _thread.interrupt_main()
            time.sleep(1)  # in which the client goes
        post(self)

    monkeypatch.setattr(Endpoint, "do_POST", stop)
    result = load_test(endpoint, clients=[1, 2], requests=10)
    assert result["interrupted"] is True
    assert [(row["clients"], row["requests"]) for row in result["results"]] == [(1, 4)]


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/images/generations"]
)
def test_an_endpoint_may_be_named_by_its_server(url: str) -> None:
    assert find_endpoint(url) == "http://h:1/v1/images/generations"


def test_an_address_of_its_own_is_kept() -> None:
    assert find_endpoint("https://h/api/openai/v1") == "https://h/api/openai/v1/images/generations"


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://h", "http://", "http://h:port", "nonsense"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="--url"):
        find_endpoint(url)


@pytest.mark.parametrize("options", [{"requests": 0}, {"clients": [0]}, {"rates": [0]}, {"rates": [float("nan")]}])
def test_a_load_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="above zero"):
        load_test("http://127.0.0.1:1", **options)


def test_a_key_is_the_first_line_that_is_one(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\n\n sesame \nother\n")
    assert read_key(file) == "sesame"
    for text in ("", "# none\n", "schlüssel\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="holds no key"):
            read_key(file)
    with pytest.raises(InputError, match="No such file"):
        read_key(tmp_path / "gone")


def test_the_plot_is_drawn_even_where_nothing_was_answered(tmp_path: Path) -> None:
    rows = [
        summarise(Level(clients=1), [Sample(0, 1)]),
        summarise(Level(rate=2.0), [Sample(0, 1), Sample(1, 3)]),
        summarise(Level(rate=9.0), [Sample(0, 1, "429 queue_full")]),
    ]
    drawn = {}
    for name, results in (("all", rows), ("none", rows[2:])):
        path = tmp_path / f"{name}.png"
        check_plot(path)
        plot_load(results, path)
        drawn[name] = np.asarray(Image.open(path).convert("L"))
    assert (drawn["all"] < 250).sum() > 1.2 * (drawn["none"] < 250).sum()


@pytest.mark.parametrize(("name", "words"), [("x.jpg", "name it"), ("gone/x.png", "does not exist")])
def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_plot(tmp_path / name)
