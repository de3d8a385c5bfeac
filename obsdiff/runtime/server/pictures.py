"""Pictures that were asked for as a URL: kept in memory for a while, under names that nobody guesses."""

import secrets
import time
from collections import OrderedDict

SECONDS = 3600.0
BYTES = 256 << 20


class Pictures:
    """The newest pictures, up to so many bytes and seconds."""

    def __init__(self, seconds: float = SECONDS, limit: int = BYTES):
        self._seconds, self._limit, self._bytes = seconds, limit, 0
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def add(self, png: bytes) -> str:
        """The name under which the picture can be had."""
        name = secrets.token_urlsafe(24)
        self._kept[name] = (time.monotonic(), png)
        self._bytes += len(png)
        self._forget()
        return name

    def get(self, name: str) -> bytes | None:
        self._forget()
        return self._kept[name][1] if name in self._kept else None

    def _forget(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._kept and (self._bytes > self._limit or next(iter(self._kept.values()))[0] < oldest):
            self._bytes -= len(self._kept.popitem(last=False)[1][1])
