"""One request for pictures: from its fields to jobs, and from their events to the answer or the stream."""

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from obsdiff.runtime.server.batching import Batcher
from obsdiff.runtime.server.errors import ApiError, unavailable
from obsdiff.runtime.server.jobs import Job
from obsdiff.runtime.server.messages import Info, Key
from obsdiff.runtime.server.schemas import MAX_SEED, Image, ImageRequest, ImageResponse, Timing, pixels
from obsdiff.runtime.server.service import Service

FIRST = 1.0  # seconds in which a stream's first event, or its error, may set the status
BEAT = 10.0  # seconds after which a silent stream says that it lives, so that no proxy cuts it


async def generate_images(service: Service, body: ImageRequest, request: Request) -> Any:
    """The answer to POST /v1/images/generations. Raises ApiError."""
    order = Order(service, body, request)
    order.submit()
    return await (order.stream() if body.stream else order.answer())


class Order:
    """A request, its pictures in the queue, and the clock that both live by."""

    def __init__(self, service: Service, body: ImageRequest, request: Request):
        self.service, self.body, self.request = service, body, request
        self.facts: dict[str, Any] = request.scope["state"]["facts"]
        self.start = time.perf_counter()
        self.events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.model: Batcher | None = None
        self.size = ""

    def submit(self) -> None:
        """Puts the request's pictures into the queue of its model."""
        body = self.body
        self.model = self.service.find(body.model)
        self.facts |= {"model": self.model.name, "n": body.n or 1}
        info = self.model.info
        if info is None:
            raise unavailable(f"the model {self.model.name} is still starting", "model_starting", 5)
        height, width = pixels(body.size, info)
        self.size = f"{width}x{height}"
        if (body.n or 1) > self.model.max_queue:
            raise ApiError(400, "invalid_value", f"n: the queue holds {self.model.max_queue} pictures", "n")
        seed = body.seed if body.seed is not None else secrets.randbelow(2**32)
        self.jobs = [
            Job(
                index=index,
                prompt=body.prompt,
                seed=(seed + index) % (MAX_SEED + 1),
                key=_key(body, info, height, width),
                events=self.events,
                previews=(body.partial_images or 0) if body.stream else 0,
                stream=bool(body.stream),
            )
            for index in range(body.n or 1)
        ]
        self.model.submit(self.jobs)

    async def answer(self) -> JSONResponse:
        """Waits for all pictures, no longer than the deadline, and not for a client that has gone."""
        pictures: dict[int, bytes] = {}
        gone = asyncio.create_task(_disconnected(self.request))
        drawing = asyncio.create_task(self._collect(pictures))
        try:
            await asyncio.wait({gone, drawing}, timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
            if drawing.done():
                drawing.result()
            else:
                raise ApiError(499, "client_gone", "the client has gone") if gone.done() else self._late()
        finally:
            gone.cancel()
            drawing.cancel()
            self._leave()
        response = ImageResponse(
            created=int(time.time()),
            data=[self._image(job, pictures[job.index]) for job in self.jobs],
            model=self.model.name if self.model else "",
            size=self.size,
            timing=self._timing(),
        )
        return JSONResponse(response.model_dump(exclude_none=True))

    async def stream(self) -> StreamingResponse:
        """Server-sent events. What fails within the first second fails with its own status, before any event."""
        try:
            first = await asyncio.wait_for(self.events.get(), min(FIRST, self._left()))
        except TimeoutError:
            first = None
        except BaseException:
            self._leave()
            raise
        if first and isinstance(first[1], ApiError):
            self._leave()
            raise first[1]
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._send(first), media_type="text/event-stream", headers=headers)

    async def _send(self, event: tuple[int, Any] | None) -> AsyncIterator[str]:
        left, shown = len(self.jobs), dict.fromkeys(range(len(self.jobs)), 0)
        try:
            while left:
                if event is None:
                    yield ": waiting\n\n"
                else:
                    index, value = event
                    if isinstance(value, ApiError):
                        raise value
                    if isinstance(value, bytes):
                        left -= 1
                        yield _event(self._completed(self.jobs[index], value))
                    else:
                        yield _event(self._step(index, value, shown))
                if left:
                    event = await self._next_event()
        except ApiError as error:
            self.facts |= {"status": error.status, "code": error.code}
            yield f"event: error\ndata: {json.dumps(error.body)}\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.facts |= {"status": 499, "code": "client_gone"}
            raise
        finally:
            self._leave()

    async def _next_event(self) -> tuple[int, Any] | None:
        """The next event, or None when it is time to say something. Raises ApiError at the deadline."""
        if self._left() <= 0:
            raise self._late()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.events.get(), min(BEAT, self._left()))
        return None

    async def _collect(self, pictures: dict[int, bytes]) -> None:
        while len(pictures) < len(self.jobs):
            index, value = await self.events.get()
            if isinstance(value, ApiError):
                raise value
            if isinstance(value, bytes):
                pictures[index] = value

    def _step(self, index: int, value: tuple[int, int, bytes | None], shown: dict[int, int]) -> dict[str, Any]:
        step, total, preview = value
        event: dict[str, Any] = {"type": "image_generation.step", "index": index, "step": step, "total": total}
        if preview:
            event |= {
                "type": "image_generation.partial_image",
                "b64_json": base64.b64encode(preview).decode(),
                "partial_image_index": shown[index],
                **self._stamp(),
            }
            shown[index] += 1
        return event

    def _completed(self, job: Job, png: bytes) -> dict[str, Any]:
        image = self._image(job, png).model_dump(exclude_none=True)
        timing = self._timing().model_dump()
        return {"type": "image_generation.completed", "index": job.index, **image, **self._stamp(), "timing": timing}

    def _stamp(self) -> dict[str, Any]:
        return {"created_at": int(time.time()), "size": self.size, "output_format": "png"}

    def _image(self, job: Job, png: bytes) -> Image:
        if self.body.response_format == "url":
            name = self.service.pictures.add(png)
            return Image(url=str(self.request.url_for("picture", name=name)), seed=job.seed)
        return Image(b64_json=base64.b64encode(png).decode(), seed=job.seed)

    def _timing(self) -> Timing:
        wait = max(0.0, self.jobs[0].started - self.jobs[0].arrived) if self.jobs[0].started else 0.0
        return Timing(wait=round(wait, 4), total=round(time.perf_counter() - self.start, 4))

    def _left(self) -> float:
        return self.start + self.service.deadline - time.perf_counter()

    def _late(self) -> ApiError:
        return ApiError(504, "deadline_exceeded", f"it was not drawn within {self.service.deadline:g} seconds")

    def _leave(self) -> None:
        """Lets go of what is not drawn, and tells the log how long it took."""
        if self.model:
            self.model.cancel(self.jobs)
        self.facts |= self._timing().model_dump()


def _key(body: ImageRequest, info: Info, height: int, width: int) -> Key:
    return Key(
        height=height,
        width=width,
        steps=body.num_inference_steps or info.steps,
        guidance=body.guidance_scale if body.guidance_scale is not None else info.guidance,
        negative_prompt=body.negative_prompt or None,
    )


def _event(value: dict[str, Any]) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
