"""A Ray Serve application: `serve run obsdiff.runtime.ray_serve:app bundle=PATH`.

Each replica is the server of `obsdiff serve` (its routes, queue and batches) around one model; Ray adds replicas while
more requests are in progress than the replicas should hold. ray and fastapi are imported when the application is built.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from obsdiff.errors import InputError

if TYPE_CHECKING:
    from ray.serve import Application


class Options(BaseModel):
    """What `serve run ... KEY=VALUE` and a RayService's `args` may say.

    `gpus` and `cpus` are what a replica takes of a machine, fractions too; `target` is how many requests a replica
    should have in progress, by which Ray scales. The others are those of `obsdiff serve`, max_wait in milliseconds.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    name: str | None = None
    backend: str = "auto"
    device: str | None = None
    max_batch_size: int = Field(8, ge=1)
    max_queue: int = Field(64, ge=1)
    max_wait: float = Field(5, ge=0)
    deadline: float = Field(120, ge=0.1)
    api_key_file: Path | None = None
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target: float | None = Field(None, gt=0)
    gpus: float = Field(0, ge=0)
    cpus: float = Field(1, ge=0)


def app(options: Options) -> "Application":
    """The application that Ray runs. Raises InputError when the bundle is none."""
    from obsdiff.export.bundle import read_manifest

    if options.max_replicas < options.min_replicas:
        raise InputError(f"max_replicas {options.max_replicas} is less than min_replicas {options.min_replicas}")
    read_manifest(Path(options.bundle))  # each replica verifies the files as well
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'obsdiff[ray,serve]'") from None

    @serve.deployment(
        name="obsdiff",
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        max_ongoing_requests=options.max_queue + 2 * options.max_batch_size,  # beyond our queue, which answers 429
        graceful_shutdown_timeout_s=options.deadline + 60,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target or 2 * options.max_batch_size,
        },
    )
    @serve.ingress(lambda: build(options))
    class Replica:
        """The server in a Ray actor."""

    return Replica.bind()  # type: ignore[attr-defined]


def build(options: Options) -> Any:
    """A replica's FastAPI application, which is up when its model is warm."""
    from obsdiff.runtime.server.app import create_app
    from obsdiff.runtime.server.guard import read_keys
    from obsdiff.runtime.server.logs import log_json
    from obsdiff.runtime.server.messages import Settings
    from obsdiff.runtime.server.service import Service

    log_json()
    name = options.name or Path(options.bundle).resolve().name
    settings = Settings("", options.backend, options.device, options.max_batch_size)
    service = Service(
        {name: options.bundle},
        settings,
        max_queue=options.max_queue,
        max_wait=options.max_wait / 1000,
        deadline=options.deadline,
    )
    application = create_app(service, read_keys(options.api_key_file) if options.api_key_file else [])
    started = application.router.lifespan_context

    @contextlib.asynccontextmanager
    async def warm(owner: Any) -> AsyncIterator[Any]:
        async with started(owner) as state:
            for model in service.models.values():
                await model.settled.wait()
            if service.failure:
                raise service.failure
            yield state

    application.router.lifespan_context = warm
    return application
