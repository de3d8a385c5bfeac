"""The queue of one model: bounded, oldest first, and joined into batches that its worker draws."""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.runtime.server.errors import ApiError, unavailable
from obsdiff.runtime.server.jobs import Job
from obsdiff.runtime.server.messages import (
    Cancel,
    Done,
    Draw,
    Failed,
    Info,
    Key,
    Picture,
    Ready,
    Refused,
    Settings,
    Step,
)
from obsdiff.runtime.server.metrics import Metrics
from obsdiff.runtime.server.worker import WorkerProcess

log = logging.getLogger("obsdiff.server")
TRIES = 2  # of a picture whose worker died
GIVE_UP = 3  # starts in a row that failed, after which a model takes no requests until one succeeds
LONGEST_WAIT = 5  # times max_wait
LONGEST_PAUSE = 30.0  # seconds between two starts


class Batcher:
    """Joins jobs with the same key into batches, one batch at a time, and keeps a worker alive to draw them.

    A batch waits up to `max_wait` seconds for company, counted from when it could have started and anew from each that
    comes (LONGEST_WAIT times at most), and only while fewer are here than were here together lately: who comes alone
    does not wait.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        metrics: Metrics,
        max_queue: int = 64,
        max_wait: float = 0.005,
        stall: float = 180,
    ):
        self.name, self.settings, self.metrics = name, settings, metrics
        self.max_queue, self.max_wait, self.stall = max_queue, max_wait, stall
        self.info: Info | None = None
        self.failure: ObsdiffError | None = None
        self.settled = asyncio.Event()  # the first start has succeeded or failed for good
        self._worker: WorkerProcess | None = None
        self._ready = self._closed = False
        self._failures = 0
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}
        self._batch: int | None = None  # that the worker draws now
        self._open: dict[tuple[int, int], Job] = {}  # pictures that the worker owes
        self._heard = 0.0  # when the worker last said something, or was given a batch
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._together: Counter[Key] = Counter()
        self._lately: Counter[Key] = Counter()
        self._seconds = 0.0  # an image, smoothed
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.waiting.labels(name).set_function(lambda: len(self._waiting))
        metrics.running.labels(name).set_function(lambda: len(self._open))
        metrics.ready.labels(name).set_function(lambda: self._ready)

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._open)

    @property
    def worker_pid(self) -> int | None:
        return self._worker.process.pid if self._worker else None

    def start(self) -> None:
        """Starts the worker; `settled` tells when it is ready, or failed with `failure`."""
        self._start_worker()
        self._spawn(self._run())

    async def stop(self) -> None:
        """Ends the worker; what still waits is answered with 503."""
        self._closed, self._ready = True, False
        for task in self._tasks:
            task.cancel()
        self._fail(unavailable("the server is shutting down", "shutting_down"), [*self._waiting, *self._open.values()])
        if self._worker:
            await self._worker.stop()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues the pictures of one request, all or none. Raises ApiError 429 when the queue is full, 503 when there
        is no worker and will not be soon."""
        if self._failures >= GIVE_UP or self._closed:
            raise unavailable(f"the model {self.name} cannot be started at present", "model_unavailable", LONGEST_PAUSE)
        if len(self._waiting) + len(jobs) > self.max_queue:
            raise ApiError(
                429,
                "queue_full",
                f"{len(self._waiting)} pictures wait and the queue holds {self.max_queue}: try again later",
                headers={"Retry-After": str(self.retry_after())},
            )
        self._waiting += jobs
        for key in {job.key for job in jobs}:
            here = sum(job.key == key for job in (*self._waiting, *self._running.values()))
            self._together[key] = max(self._together[key], here)
        self._wake.set()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: they leave the queue, or the batch after its current step."""
        for job in jobs:
            if job.over:
                continue
            job.over = True
            self.metrics.cancelled.labels(self.name).inc()
            if job in self._waiting:
                self._waiting.remove(job)
            for (batch, index), other in list(self._open.items()):
                if other is job and self._worker:
                    self._worker.send(Cancel(batch, index))
                    if batch != self._batch:
                        del self._open[batch, index]
        self._wake.set()

    def retry_after(self) -> int:
        """Whole seconds until about half of what waits is drawn, by the speed measured lately."""
        return max(1, min(600, round(len(self._waiting) * self._seconds / 2)))

    async def _run(self) -> None:
        while not self._closed:
            batch = await self._next_batch()
            number = next(self._numbers)
            now = time.perf_counter()
            for index, job in enumerate(batch):
                self._waiting.remove(job)
                self._open[number, index] = self._running[index] = job
                job.started, job.tries = now, job.tries + 1
                self.metrics.wait.labels(self.name).observe(now - job.arrived)
            self._batch, self._heard = number, now
            self._lately, self._together = self._together, Counter()
            self.metrics.batch.labels(self.name).observe(len(batch))
            if self._worker:
                self._worker.send(
                    Draw(
                        number,
                        batch[0].key,
                        tuple(job.prompt for job in batch),
                        tuple(job.seed for job in batch),
                        tuple(job.previews for job in batch),
                        any(job.stream for job in batch),
                    )
                )

    async def _next_batch(self) -> list[Job]:
        """The oldest job and those that can be drawn with it, once the worker is free and the wait is over."""
        free_since = None
        while True:
            self._wake.clear()
            timeout = None
            if self._batch is not None:
                timeout, free_since = self._heard + self.stall - time.perf_counter(), None
            elif self._ready and self._waiting and self.info:
                now = time.perf_counter()
                free_since = free_since or now
                oldest = self._waiting[0]
                same = [job for job in self._waiting if job.key == oldest.key and not job.tries]
                batch = [oldest] if oldest.tries else same[: self.info.max_batch]  # what killed a worker goes alone
                expected = max(self._together[oldest.key], self._lately[oldest.key])
                latest = max(free_since, same[-1].arrived if same else 0.0)
                timeout = min(latest + self.max_wait, free_since + LONGEST_WAIT * self.max_wait) - now
                if oldest.tries or timeout <= 0 or len(batch) >= min(self.info.max_batch, expected):
                    return batch
            try:
                await asyncio.wait_for(self._wake.wait(), timeout)
            except TimeoutError:
                if self._batch is not None and self._worker and time.perf_counter() >= self._heard + self.stall:
                    self._heard = time.perf_counter()
                    log.error("worker stalled", extra={"data": {"model": self.name, "seconds": self.stall}})
                    self._worker.kill()

    def _start_worker(self) -> None:
        self._worker = WorkerProcess(self.settings, self._on_message, self._on_exit)
        log.info("worker started", extra={"data": {"model": self.name, "pid": self._worker.process.pid}})

    def _on_message(self, message: Any) -> None:
        self._heard = time.perf_counter()
        if isinstance(message, Ready):
            self.info, self._ready, self._failures = message.info, True, 0
            self._seconds = self._seconds or 0.1
            log.info("model ready", extra={"data": {"model": self.name, **_told(message.info)}})
            self.settled.set()
        elif isinstance(message, Failed):
            kind = InputError if message.code == 2 else ObsdiffError
            self._give_up(kind(message.message))
        elif isinstance(message, Step):
            for (batch, index), job in self._open.items():
                if batch == message.batch and job.stream and not job.over:
                    job.events.put_nowait((job.index, (message.step, message.total, message.previews.get(index))))
        elif isinstance(message, (Picture, Refused)):
            place = (message.batch, message.index)
            if place in self._open:
                job = self._open.pop(place)
                if isinstance(message, Picture) and not job.over:
                    self.metrics.images.labels(self.name).inc()
                job.finish(message.png if isinstance(message, Picture) else _refusal(message))
        elif isinstance(message, Done):
            self._done(message)
        self._wake.set()

    def _done(self, message: Done) -> None:
        drawn = len(self._running) - message.dropped
        if drawn > 0:
            self._seconds = 0.7 * self._seconds + 0.3 * message.seconds / drawn
        for seconds in message.steps:
            self.metrics.step.labels(self.name).observe(seconds)
        for place, job in list(self._open.items()):
            if job.over and place[0] == message.batch:
                del self._open[place]
        self._batch, self._running = None, {}

    def _on_exit(self, worker: WorkerProcess) -> None:
        """The worker died: its pictures get a second try, those that had it 503, and a new worker is started."""
        self._failures = 0 if self._ready else self._failures + 1
        self._ready, self._batch, self._running = False, None, {}
        code = worker.process.exitcode
        log.error("worker died", extra={"data": {"model": self.name, "pid": worker.process.pid, "exit_code": code}})
        owed, self._open = list(self._open.values()), {}
        self._fail(unavailable("the worker died twice on this", "worker_died"), [j for j in owed if j.tries >= TRIES])
        self._waiting[:0] = [job for job in owed if not job.over]
        if self._failures >= GIVE_UP:
            self._fail(unavailable(f"the model {self.name} cannot be started", "model_unavailable"), self._waiting)
            self._give_up(ObsdiffError(f"the worker of {self.settings.path} dies while it starts (exit code {code})"))
        if not self._closed and not self.failure:
            self.metrics.restarts.labels(self.name).inc()
            self._spawn(self._restart())
        self._wake.set()

    async def _restart(self) -> None:
        await asyncio.sleep(min(LONGEST_PAUSE, 0.1 * 4**self._failures))
        self._start_worker()

    def _give_up(self, error: ObsdiffError) -> None:
        """At the first start for good; later the model may come back."""
        log.error("worker failed to start", extra={"data": {"model": self.name, "reason": str(error)}})
        if not self.settled.is_set():
            self.failure = error
            self.settled.set()

    def _fail(self, error: ApiError, jobs: Iterable[Job]) -> None:
        for job in list(jobs):
            job.finish(error)
            if job in self._waiting:
                self._waiting.remove(job)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the queue failed", exc_info=error)


def _told(info: Info) -> dict[str, Any]:
    return {name: value for name, value in asdict(info).items() if name != "sides"}


def _refusal(message: Refused) -> ApiError:
    if message.fault == "client":
        return ApiError(400, "invalid_value", message.message)
    return ApiError(500, "engine_error", message.message)
