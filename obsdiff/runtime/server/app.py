"""The HTTP application: OpenAI's images API, models, health, metrics, and a page where there is one."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from obsdiff import __version__
from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.guard import Guard
from obsdiff.runtime.server.images import generate_images
from obsdiff.runtime.server.metrics import CONTENT_TYPE_LATEST
from obsdiff.runtime.server.schemas import (
    ErrorBody,
    Health,
    ImageRequest,
    ImageResponse,
    Model,
    ModelList,
    describe,
    first_error,
)
from obsdiff.runtime.server.service import Service

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again after an upgrade; the ETag keeps that short
}
WHY = {
    400: "The request cannot be drawn; the message says why.",
    401: "An API key is needed.",
    404: "There is no such model, route or picture.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "Drawing failed.",
    503: "Starting, shutting down, or the worker died twice; Retry-After says when to come back.",
    504: "The deadline passed.",
}


class Page(StaticFiles):
    """The page's files, which may load nothing but each other."""

    async def get_response(self, path: str, scope: Any) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)  # no route either
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": WHY[status]} for status in statuses}


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The application over a service, which it starts and stops. With keys, /v1/ wants one of them."""

    @contextlib.asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="obsdiff", version=__version__, lifespan=life, redirect_slashes=False, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, state=service, keys=keys)
    _add_handlers(app)

    @app.post(
        "/v1/images/generations",
        response_model=ImageResponse,
        response_model_exclude_none=True,
        responses={
            200: {
                "description": "Pictures; with `stream`, events of the types image_generation.step, .partial_image and "
                ".completed.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **_errors(400, 401, 404, 408, 413, 429, 500, 503, 504),
        },
    )
    async def generations(body: ImageRequest, request: Request) -> Any:
        """Draw pictures, as OpenAI's client asks for them."""
        return await generate_images(service, body, request)

    @app.get("/v1/models", responses=_errors(401))
    async def models() -> ModelList:
        """The models that are served, and what sizes they draw."""
        return ModelList(data=[_describe(service, name) for name in service.models])

    @app.get("/v1/models/{model}", responses=_errors(401, 404))
    async def model(model: str) -> Model:
        """One model."""
        service.find(model)
        return _describe(service, model)

    @app.get(
        "/v1/pictures/{name}.png",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "A picture."}, **_errors(404)},
    )
    async def picture(name: str) -> Response:
        """A picture that was asked for as a URL."""
        if (png := service.pictures.get(name)) is None:
            raise ApiError(404, "not_found", "there is no such picture, or not any more")
        return Response(png, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/health/live")
    async def live() -> Health:
        """The server runs."""
        return Health(status="live")

    @app.get("/health/ready", responses={503: {"model": Health, "description": "Not now."}})
    async def ready() -> Response:
        """Every model is warmed up and requests are taken."""
        ready = {name: model.ready for name, model in service.models.items()}
        status = "draining" if service.draining else "ready" if all(ready.values()) else "starting"
        health = Health(status=status, models=ready)  # type: ignore[arg-type]
        return JSONResponse(health.model_dump(), 200 if status == "ready" else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "For Prometheus."}},
    )
    async def metrics() -> Response:
        """What Prometheus collects."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    if PAGE.is_dir():  # after every route: a mount at / would answer for wrong methods of the others
        app.router.default = Page(directory=PAGE, html=True)
    app.openapi = lambda: _true_openapi(app)  # type: ignore[method-assign]
    return app


def _describe(service: Service, name: str) -> Model:
    batcher = service.models[name]
    return describe(name, service.created, batcher.info, batcher.ready)


def _add_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def answer(request: Request, error: ApiError) -> JSONResponse:
        request.scope["state"]["facts"]["code"] = error.code
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, first_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        return answer(request, ApiError(error.status_code, code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "internal_error", "the server failed; its log says why").body, 500)


def _true_openapi(app: FastAPI) -> dict[str, Any]:
    """The document without what FastAPI adds on its own: requests that fit no schema are answered with 400 here."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
