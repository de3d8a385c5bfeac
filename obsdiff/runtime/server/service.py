"""All models of one server, and what they share."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from obsdiff.errors import ObsdiffError
from obsdiff.runtime.server.batching import Batcher
from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.messages import Settings
from obsdiff.runtime.server.metrics import Metrics
from obsdiff.runtime.server.pictures import Pictures

PICTURES = ("POST", "/v1/images/generations")
GRACE = 60.0  # seconds past the deadline after which a batch that says nothing is given up


class Service:
    """Batchers by model name. `on_failure` is called when a model cannot be started the first time."""

    def __init__(
        self,
        bundles: Mapping[str, str],
        settings: Settings,
        *,
        max_queue: int = 64,
        max_wait: float = 0.005,
        deadline: float = 120,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.bundles, self.settings, self.deadline = bundles, settings, deadline
        self.max_queue, self.max_wait, self.on_failure = max_queue, max_wait, on_failure
        self.metrics, self.pictures = Metrics(), Pictures()
        self.created = int(time.time())
        self.models: dict[str, Batcher] = {}
        self.draining, self.active = False, 0
        self._idle = asyncio.Event()
        self._watch: list[asyncio.Task[None]] = []

    @property
    def failure(self) -> ObsdiffError | None:
        return next((model.failure for model in self.models.values() if model.failure), None)

    def start(self) -> None:
        """Starts a worker for each model and returns at once."""
        for name, path in self.bundles.items():
            settings = replace(self.settings, path=path)
            stall = self.deadline + GRACE
            self.models[name] = Batcher(name, settings, self.metrics, self.max_queue, self.max_wait, stall)
            self.models[name].start()
        self._watch = [asyncio.create_task(self._settled(model)) for model in self.models.values()]

    async def _settled(self, model: Batcher) -> None:
        await model.settled.wait()
        if model.failure:
            self.on_failure()

    async def drain(self) -> None:
        """Takes no more requests, and returns when all that were taken are answered, or had the time to be."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.deadline + GRACE):
                while self.active:
                    self._idle.clear()
                    await self._idle.wait()

    def enter(self) -> None:
        """A request came."""
        self.active += 1

    def leave(self, route: tuple[str, str], status: int, seconds: float, facts: Mapping[str, Any]) -> None:
        """A request was answered, or its client went; requests for pictures are counted."""
        self.active -= 1
        self._idle.set()
        if route != PICTURES:
            return
        name = facts.get("model", "")
        self.metrics.requests.labels(name, str(status)).inc()
        if status == 200:
            self.metrics.latency.labels(name).observe(seconds)
        else:
            self.metrics.errors.labels(name, facts.get("code", "unknown")).inc()

    async def stop(self) -> None:
        """Ends the workers."""
        for task in self._watch:
            task.cancel()
        await asyncio.gather(*(model.stop() for model in self.models.values()))

    def find(self, name: str | None) -> Batcher:
        """The model of that name; without one, the first. Raises ApiError 404."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, "model_not_found", f"there is no such model; there are: {known}", "model")
        return self.models[name]
