"""The queue of a model, over a worker that does what the test tells it."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from obsdiff.errors import InputError
from obsdiff.runtime.server import batching
from obsdiff.runtime.server.batching import Batcher
from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.jobs import Job
from obsdiff.runtime.server.messages import Cancel, Done, Draw, Failed, Info, Key, Picture, Ready, Refused, Settings
from obsdiff.runtime.server.metrics import Metrics

INFO = Info("sha256:0", "torch", "cpu", 4, 32, 32, 20, 4.0)
KEY = Key(32, 32, 20, 4.0, None)


class Puppet:
    """Stands in for a worker's process: keeps what it was sent, says what it is told to say."""

    lives: list["Puppet"]

    def __init__(self, _settings: Settings, on_message: Callable[[Any], None], on_exit: Callable[[Any], None]):
        self.say, self._on_exit = on_message, on_exit
        self.sent: list[Any] = []
        self.killed = False
        self.process = SimpleNamespace(pid=1, exitcode=-9)
        self.lives.append(self)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        self.killed = True
        self.die()

    async def stop(self) -> None:
        self.killed = True

    def die(self) -> None:
        self._on_exit(self)

    @property
    def batches(self) -> list[Draw]:
        return [message for message in self.sent if isinstance(message, Draw)]

    def finish(self, number: int = -1) -> None:
        """Draws all of a batch."""
        batch = self.batches[number]
        self.say(Done(batch.batch, 0.2 * len(batch.prompts), (0.1,), 0))
        for index in range(len(batch.prompts)):
            self.say(Picture(batch.batch, index, f"{batch.prompts[index]}".encode()))


@pytest.fixture(autouse=True)
def _puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    Puppet.lives = []
    monkeypatch.setattr(batching, "WorkerProcess", Puppet)
    monkeypatch.setattr(batching, "LONGEST_PAUSE", 0.01)


def job(prompt: str, key: Key = KEY, events: Any = None) -> Job:
    return Job(0, prompt, 0, key, events or asyncio.Queue())


def with_batcher(test: Callable[[Batcher], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Runs the test with a batcher whose worker is ready."""

    async def main() -> None:
        batcher = Batcher("m", Settings("bundle"), Metrics(), **{"max_queue": 8, "max_wait": 0.02, **options})
        batcher.start()
        Puppet.lives[0].say(Ready(INFO))
        try:
            await test(batcher)
        finally:
            await batcher.stop()

    asyncio.run(main())


async def settle(seconds: float = 0.0) -> None:
    """Lets everything happen that can."""
    await asyncio.sleep(seconds)
    for _ in range(10):
        await asyncio.sleep(0)


async def result(one: Job) -> Any:
    return (await asyncio.wait_for(one.events.get(), 5))[1]


def test_who_comes_alone_does_not_wait() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([one := job("a")])
        await settle()
        assert [batch.prompts for batch in Puppet.lives[0].batches] == [("a",)]
        Puppet.lives[0].finish()
        assert await result(one) == b"a"

    with_batcher(test, max_wait=60)


def test_the_same_options_share_a_batch_and_the_oldest_goes_first() -> None:
    async def test(batcher: Batcher) -> None:
        other = Key(32, 32, 21, 4.0, None)
        jobs = [job("a"), job("b", other), job("c"), job("d"), job("e"), job("f"), job("g", other)]
        batcher.submit([jobs[0]])
        await settle()
        batcher.submit(jobs[1:])
        for _ in range(3):
            Puppet.lives[0].finish()
            await settle(0.05)
        batches = Puppet.lives[0].batches
        assert [batch.prompts for batch in batches] == [("a",), ("b", "g"), ("c", "d", "e", "f")]
        assert [batch.key for batch in batches] == [KEY, other, KEY]

    with_batcher(test)


def test_a_batch_waits_for_those_who_were_together_lately() -> None:
    async def test(batcher: Batcher) -> None:
        first = [job("a"), job("b")]
        batcher.submit([first[0]])
        await settle()
        batcher.submit([first[1]])
        Puppet.lives[0].finish()
        await settle()
        assert len(Puppet.lives[0].batches) == 1, "b waits for a's next request"
        batcher.submit([job("a")])
        await settle()
        assert Puppet.lives[0].batches[-1].prompts == ("b", "a")

    with_batcher(test, max_wait=60)


def test_the_wait_ends() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([job("a")])
        await settle()
        batcher.submit([job("b")])
        Puppet.lives[0].finish()
        await settle(0.1)
        assert Puppet.lives[0].batches[-1].prompts == ("b",)

    with_batcher(test)


def test_beyond_the_queue_is_429_for_all_pictures_of_the_request_or_none() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([job("running")])
        await settle()
        batcher.submit([job(str(k)) for k in range(6)])
        with pytest.raises(ApiError, match="the queue holds 8") as caught:
            batcher.submit([job("x"), job("y"), job("z")])
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers["Retry-After"]) >= 1
        batcher.submit([job("x"), job("y")])
        for _ in range(3):
            Puppet.lives[0].finish()
            await settle(0.05)
        assert sum(len(batch.prompts) for batch in Puppet.lives[0].batches) == 9

    with_batcher(test)


def test_retry_after_follows_the_speed_that_was_measured() -> None:
    async def test(batcher: Batcher) -> None:
        for _ in range(20):
            batcher.submit([job("a")])
            await settle()
            batch = Puppet.lives[0].batches[-1]
            Puppet.lives[0].say(Done(batch.batch, 10.0, (), 0))
            await settle()
        batcher.submit([job("running")])
        await settle()
        batcher.submit([job("a")] * 8)
        assert 36 <= batcher.retry_after() <= 40  # half of 8 pictures at 10 s

    with_batcher(test)


def test_the_cancelled_leave_the_queue_and_the_batch() -> None:
    async def test(batcher: Batcher) -> None:
        running, waiting = job("a"), job("b")
        batcher.submit([running])
        await settle()
        batcher.submit([waiting])
        batcher.cancel([running, waiting])
        assert Puppet.lives[0].sent[-1] == Cancel(Puppet.lives[0].batches[0].batch, 0)
        Puppet.lives[0].say(Done(Puppet.lives[0].batches[0].batch, 0.1, (), 1))
        await settle(0.05)
        assert len(Puppet.lives[0].batches) == 1
        assert not batcher.busy
        assert running.events.empty()
        assert waiting.events.empty()
        assert batcher.metrics.registry.get_sample_value("obsdiff_cancelled_images_total", {"model": "m"}) == 2

    with_batcher(test)


def test_a_worker_that_dies_is_replaced_and_its_pictures_are_tried_once_more_alone() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit(jobs := [job("a"), job("b")])
        await settle()
        assert Puppet.lives[0].batches[0].prompts == ("a", "b")
        Puppet.lives[0].die()
        assert not batcher.ready
        await settle(0.2)
        Puppet.lives[1].say(Ready(INFO))
        await settle(0.05)
        assert [batch.prompts for batch in Puppet.lives[1].batches] == [("a",)]
        Puppet.lives[1].die()
        error = await result(jobs[0])
        assert (error.status, error.code) == (503, "worker_died")
        assert "Retry-After" in error.headers
        await settle(0.2)
        Puppet.lives[2].say(Ready(INFO))
        await settle(0.05)
        Puppet.lives[2].finish()
        assert await result(jobs[1]) == b"b"
        assert batcher.metrics.registry.get_sample_value("obsdiff_worker_restarts_total", {"model": "m"}) == 2

    with_batcher(test)


def test_a_model_that_comes_up_no_more_answers_503_and_comes_back() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([one := job("a")])
        await settle()
        for life in range(4):
            Puppet.lives[life].die()
            await settle(0.05)
        assert (await result(one)).code == "model_unavailable"
        with pytest.raises(ApiError, match="cannot be started at present"):
            batcher.submit([job("b")])
        Puppet.lives[4].say(Ready(INFO))
        batcher.submit([job("b")])
        await settle()
        assert Puppet.lives[4].batches[0].prompts == ("b",)
        assert batcher.failure is None

    with_batcher(test)


@pytest.mark.parametrize("code", [1, 2])
def test_a_model_that_cannot_be_started_at_all_says_why(code: int) -> None:
    async def main() -> None:
        batcher = Batcher("m", Settings("bundle"), Metrics())
        batcher.start()
        Puppet.lives[0].say(Failed("bundle: it is broken", code))
        Puppet.lives[0].die()
        await asyncio.wait_for(batcher.settled.wait(), 1)
        assert (str(batcher.failure), batcher.failure.exit_code) == ("bundle: it is broken", code)  # type: ignore[union-attr]
        assert isinstance(batcher.failure, InputError) == (code == 2)
        await settle(0.2)
        assert len(Puppet.lives) == 1
        await batcher.stop()

    asyncio.run(main())


def test_a_worker_that_says_nothing_is_killed() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([one := job("a")])
        await settle(0.3)
        assert Puppet.lives[0].killed
        Puppet.lives[1].say(Ready(INFO))
        await settle(0.02)
        Puppet.lives[1].finish()
        assert await result(one) == b"a"

    with_batcher(test, stall=0.1)


def test_what_cannot_be_drawn_is_the_clients_fault_or_ours() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit(jobs := [job("a"), job("b")])
        await settle()
        number = Puppet.lives[0].batches[0].batch
        Puppet.lives[0].say(Refused(number, 0, "no such class", "client"))
        Puppet.lives[0].say(Refused(number, 1, "out of memory", "server"))
        assert [(await result(one)).status for one in jobs] == [400, 500]

    with_batcher(test)


def test_nothing_is_answered_twice() -> None:
    async def test(batcher: Batcher) -> None:
        batcher.submit([one := job("a")])
        await settle()
        Puppet.lives[0].finish()
        number = Puppet.lives[0].batches[0].batch
        Puppet.lives[0].say(Picture(number, 0, b"again"))
        Puppet.lives[0].say(Refused(number, 0, "late", "server"))
        Puppet.lives[0].die()
        await settle()
        assert await result(one) == b"a"
        assert one.events.empty()

    with_batcher(test)


def test_a_stop_answers_what_waits() -> None:
    async def main() -> None:
        batcher = Batcher("m", Settings("bundle"), Metrics())
        batcher.start()
        batcher.submit([one := job("a")])
        await batcher.stop()
        assert (await result(one)).code == "shutting_down"
        assert Puppet.lives[0].killed

    asyncio.run(main())
