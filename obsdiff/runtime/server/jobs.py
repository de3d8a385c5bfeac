"""What waits in a queue: one picture of a request."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.messages import Key


@dataclass(eq=False)
class Job:
    """One picture of a request. What happens to it goes into `events`, which the pictures of a request share:
    (index, Step), (index, PNG) or (index, ApiError), the last two once."""

    index: int
    prompt: str
    seed: int
    key: Key
    events: "asyncio.Queue[tuple[int, Any]]"
    previews: int = 0
    stream: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    tries: int = 0
    over: bool = False

    def finish(self, result: "bytes | ApiError") -> None:
        """Gives the result, unless there was one or nobody waits any more."""
        if not self.over:
            self.over = True
            self.events.put_nowait((self.index, result))
