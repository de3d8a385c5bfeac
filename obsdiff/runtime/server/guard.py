"""What every request passes before its route: id, key, body limits, drain; and after it: log and headers."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from obsdiff.errors import InputError
from obsdiff.runtime.server.errors import ApiError, unavailable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("obsdiff.access")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
QUIET = ("/health/live", "/health/ready", "/metrics")  # asked every few seconds


def read_keys(path: Path) -> list[str]:
    """API keys, one a line; empty lines and those that begin with # are none. Raises InputError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path}: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise InputError(f"--api-key-file {path}: it holds no key; leave the option out to serve without")
    return keys


class Guard:
    """ASGI middleware around the routes; `state` is the service."""

    def __init__(
        self, app: Any, state: Any, keys: Sequence[str] = (), max_body: int = 1 << 16, body_seconds: float = 15
    ):
        self.app, self.state, self.max_body, self.body_seconds = app, state, max_body, body_seconds
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode("ascii") if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        facts: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {})["facts"] = facts
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                if self.state.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self.state.enter()
        try:
            try:
                receive = await self._admit(scope, headers, receive)
            except ApiError as error:
                facts["code"] = error.code
                close = (
                    {"Connection": "close"} if error.status in (408, 413) else {}
                )  # the rest of the body is not read
                response = JSONResponse(error.body, error.status, {**error.headers, **close})
                return await response(scope, receive, answer)
            await self.app(scope, receive, answer)
        finally:
            told = facts.pop("status", status) or 499  # the client went before there was an answer
            seconds, route = time.perf_counter() - start, (scope["method"], scope["path"])
            self.state.leave(route, told, seconds, facts)
            level = logging.DEBUG if route[1] in QUIET else logging.INFO
            data = {"method": route[0], "path": route[1][:200], "status": told, "ms": round(seconds * 1e3, 2), **facts}
            log.log(level, "request", extra={"data": data})
        return None

    async def _admit(self, scope: Message, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Raises ApiError, or gives the request's body back, read to its end."""
        if scope["path"].startswith("/v1/") and not scope["path"].startswith("/v1/pictures/"):
            self._check_key(headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            return receive
        if self.state.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        try:
            async with asyncio.timeout(self.body_seconds):
                return _replay(await self._read(headers, receive), receive)
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the body took more than {self.body_seconds:g} seconds") from None

    def _check_key(self, authorization: bytes) -> None:
        if not self._keys:
            return
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, whichever fits
        if scheme.lower() != b"bearer" or not any(found):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        too_big = ApiError(413, "body_too_large", f"the body has more than {self.max_body} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body:
            raise too_big
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "client_gone", "the body ended early")
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise too_big
            if not message.get("more_body"):
                return body


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """What was read, once; then what comes from the client: that it has gone."""
    left = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return again
