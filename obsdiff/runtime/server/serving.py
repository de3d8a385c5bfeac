"""The server process: checks, starts, drains, ends."""

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.runtime.server.app import create_app
from obsdiff.runtime.server.guard import read_keys
from obsdiff.runtime.server.logs import log_json
from obsdiff.runtime.server.messages import Settings
from obsdiff.runtime.server.service import Service

log = logging.getLogger("obsdiff.server")
HEADER_SECONDS = 15.0  # that a connection gets to send the head of its first request
KEEP_ALIVE = 30  # seconds; longer than clients keep theirs, so that none sends into a connection that closes
BACKLOG = 2048
FILES = 65536


class ImpatientProtocol(H11Protocol):
    """Closes a connection that does not begin a request: uvicorn waits for the first one for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEADER_SECONDS, self._hurry, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._patience:
            self._patience.cancel()
        super().connection_lost(exc)

    def _hurry(self, transport: asyncio.Transport) -> None:
        if self.cycle is None:
            transport.close()


class Server(uvicorn.Server):
    """uvicorn, but a signal first lets the service drain; a second one answers what is left with 503."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.loop = asyncio.get_running_loop()
        self.signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        self.force_exit = self.signals > 2
        name = signal.Signals(sig).name
        self.loop.call_soon_threadsafe(self._leave, "draining" if self.signals == 1 else "aborting", name)

    def _leave(self, how: str, name: str) -> None:
        log.info(how, extra={"data": {"signal": name, "active": self.service.active}})
        self._leaving = self.loop.create_task(self.service.drain() if how == "draining" else self.service.stop())
        self._leaving.add_done_callback(lambda _: setattr(self, "should_exit", True))


def name_bundles(arguments: Sequence[str]) -> dict[str, str]:
    """Paths by model name: `NAME=PATH`, or the folder's name. Raises InputError for a name that is there twice."""
    named: dict[str, str] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not path or Path(argument).exists():
            name, path = Path(argument).resolve().name if Path(argument).exists() else argument, argument
        if not name.isprintable() or "/" in name or not name:
            raise InputError(f"{name!r} is no name for a model: give one, NAME=PATH")
        if name in named:
            raise InputError(f"two models are named {name}: name one of them, NAME=PATH")
        named[name] = path
    return named


def run(
    bundles: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    backend: str = "auto",
    build: bool = True,
    device: str | None = None,
    max_batch_size: int = 8,
    max_queue: int = 64,
    max_wait: float = 0.005,
    deadline: float = 120,
    api_key_file: Path | None = None,
) -> None:
    """Serves until a signal says otherwise. Raises InputError or ObsdiffError when it cannot start."""
    named = name_bundles(bundles)
    keys = read_keys(api_key_file) if api_key_file else []
    listener = listen(host, port)
    log_json()
    _raise_file_limit()
    settings = Settings("", backend, device, max_batch_size, build)
    with listener:
        asyncio.run(_serve(listener, named, settings, keys, max_queue=max_queue, max_wait=max_wait, deadline=deadline))


async def _serve(
    listener: socket.socket, bundles: Mapping[str, str], settings: Settings, keys: Sequence[str], **limits: Any
) -> None:
    def fail() -> None:
        server.should_exit = True

    service = Service(bundles, settings, on_failure=fail, **limits)
    config = uvicorn.Config(
        create_app(service, keys),
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=KEEP_ALIVE,
        server_header=False,
    )
    server = Server(config, service)
    host, port = listener.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log.info("listening", extra={"data": {"url": where, "models": list(bundles), "keys": len(keys)}})
    try:
        await server.serve(sockets=[listener])
    finally:
        await service.stop()
    if failure := service.failure:
        raise failure
    if server.signals > 1:
        raise KeyboardInterrupt
    if not server.started:
        raise ObsdiffError("the server could not be started")
    log.info("stopped")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError when the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)  # without its protocol, asyncio sets no TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', error) or error}") from None
    return listener


def _raise_file_limit() -> None:
    """Each connection takes a file: as many as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
