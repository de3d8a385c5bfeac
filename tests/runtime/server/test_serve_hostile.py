"""Clients that go, dawdle, or mean no good; workers that die; and the document that is true."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import schemathesis

from server import LONG, PROMPT, Server, wait_for

HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connect(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=30)


def idle(server: Server) -> bool:
    return server.metric("obsdiff_running_images") + server.metric("obsdiff_queue_length") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_has_gone_is_drawn_no_further(server: Server, stream: bool) -> None:
    wait_for(lambda: idle(server))
    cancelled = server.metric("obsdiff_cancelled_images_total")
    done = server.metric("obsdiff_images_total")
    with ThreadPoolExecutor(1) as pool:
        with connect(server) as one:
            body = f'{{"prompt": "{PROMPT}", "num_inference_steps": 150, "stream": {str(stream).lower()}}}'
            one.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: server.metric("obsdiff_running_images") == 1)
            stays = pool.submit(server.draw, **LONG)
        wait_for(lambda: server.metric("obsdiff_cancelled_images_total") == cancelled + 1)
        assert stays.result().status_code == 200
    wait_for(lambda: idle(server))
    assert server.metric("obsdiff_images_total") == done + 1
    assert any(line["status"] == 499 for line in server.logged("request")[-4:])


def test_a_worker_that_is_killed_is_replaced_and_nothing_hangs(server: Server) -> None:
    restarts = server.metric("obsdiff_worker_restarts_total", model="plain")
    pid = next(line["pid"] for line in reversed(server.logged("worker started")) if line["model"] == "plain")
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.draw, model="plain", seed=k, **LONG) for k in range(6)]
        wait_for(lambda: server.metric("obsdiff_running_images", model="plain") >= 1)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.http.get("/health/ready").status_code == 503)
        assert server.http.get("/health/live").status_code == 200
        assert server.draw(model="one-block").status_code == 200, "the other model goes on"
        answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert server.ready().metric("obsdiff_worker_restarts_total", model="plain") == restarts + 1
    assert server.logged("worker died")[-1]["exit_code"] == -9


def test_a_huge_body_is_refused_before_it_is_read(server: Server) -> None:
    with connect(server) as one:
        one.sendall(f"{HEAD}Content-Length: 99999999999\r\n\r\n".encode())
        assert one.recv(4096).startswith(b"HTTP/1.1 413 ")
    with connect(server) as one:  # nor does it help to hide the size
        one.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may close before all is sent
            for _ in range(20):
                one.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        assert one.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "raw",
    [b"\x16\x03\x01\x02\x00\x01", b"GET /nowhere HTTP/9.9\r\n\r\n", b"POST /v1/images/generations HTTP/1.1\r\n\r\n",
     HEAD.encode() + b"Content-Length: -1\r\n\r\n", HEAD.encode() + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
     b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=lambda raw: raw[:20].decode("latin1"),
)  # fmt: skip
def test_what_is_hardly_http_is_answered(server: Server, raw: bytes) -> None:
    with connect(server) as one:
        one.sendall(raw)
        assert one.recv(4096).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 "))


def test_slow_bodies_and_idle_connections_keep_nobody_waiting(server: Server) -> None:
    with connect(server) as slow:
        slow.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        idlers = [connect(server) for _ in range(500)]
        start = time.monotonic()
        assert server.draw().status_code == 200
        slow.settimeout(60)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - start < 45
        for one in idlers:
            one.settimeout(60)
            assert one.recv(1) == b"", "an idle connection is closed"
            one.close()


def test_paths_that_try_to_leave(server: Server) -> None:
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/..%2fapp.py", "//etc/passwd", "/app.py"):
        with connect(server) as one:
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert one.recv(4096).startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), path


def test_schemathesis_finds_no_lie_in_the_document(server: Server) -> None:
    """Whatever the document allows or forbids, the answer is one that it names."""
    from hypothesis import HealthCheck, Phase, settings

    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    checks = [schemathesis.checks.load_all_checks, schemathesis.checks.CHECKS]
    checks[0]()
    wanted = [
        check
        for check in checks[1].get_all()
        if check.__name__ not in ("positive_data_acceptance", "max_response_time")
    ]  # sizes that a model does not draw fit the schema
    tried: list[int] = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=25, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), derandomize=True,
        )  # fmt: skip
        @_given(operation)
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("num_inference_steps"), int):
                case.body["num_inference_steps"] = min(case.body["num_inference_steps"], 2)
            answer = case.call(timeout=60)
            tried.append(answer.status_code)
            case.validate_response(answer, checks=wanted)

        ask()
    assert {200, 400, 404} <= set(tried)
    assert not [status for status in tried if status >= 500]


def _given(operation: Any) -> Any:
    from hypothesis import given
    from hypothesis import strategies as st

    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    return given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))


@pytest.mark.slow
def test_a_soak_at_twice_what_it_can(server: Server) -> None:
    """Half a minute of too many clients, some of which leave or send nonsense, while the worker is killed twice: every
    request is answered once, and the server grows by less than 5 % after its first third."""
    psutil = pytest.importorskip("psutil")
    seconds = float(os.environ.get("OBSDIFF_SOAK", 30))
    process = psutil.Process(server.process.pid)
    codes: dict[int, int] = {}
    sizes: list[int] = []
    stop = time.monotonic() + seconds

    async def one_client(http: httpx.AsyncClient, number: int) -> None:
        while time.monotonic() < stop:
            if number % 8 == 7:
                answer = await http.post("/v1/images/generations", content=b'{"prompt": \xff')
                assert answer.status_code == 400
                await asyncio.sleep(0.1)
                continue
            body = {"prompt": PROMPT, "seed": number, "num_inference_steps": 4 + number % 2}
            try:
                patience = 0.2 if number % 8 == 6 else 120
                answer = await http.post("/v1/images/generations", json=body, timeout=patience)
            except httpx.ReadTimeout:
                assert number % 8 == 6, "a client that waits is answered"
                continue
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
            if answer.status_code == 429:
                await asyncio.sleep(0.5)
            else:
                assert len(answer.json()["data"]) == 1

    async def killer() -> None:
        for part in (0.2, 0.5):
            await asyncio.sleep(seconds * part)
            line = [line for line in server.logged("worker started") if line["model"] == "one-block"][-1]
            if psutil.pid_exists(line["pid"]):
                os.kill(line["pid"], signal.SIGKILL)

    async def scales() -> None:
        while time.monotonic() < stop:
            sizes.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits) as http:
            await asyncio.gather(killer(), scales(), *(one_client(http, number) for number in range(32)))

    asyncio.run(main())
    assert set(codes) <= {200, 429, 503}
    assert codes[200] > 10
    assert codes.get(503, 0) <= 4, "only what a second death met"
    wait_for(lambda: idle(server))
    server.ready()
    third = sizes[len(sizes) // 3]
    assert max(sizes[-5:]) < 1.05 * third + (1 << 20)
