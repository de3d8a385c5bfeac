"""What goes in and out: OpenAI's images API, with the extensions that open servers share."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.messages import Info

MAX_PROMPT = 4000
MAX_IMAGES = 10
MAX_STEPS = 150
MAX_GUIDANCE = 100
MAX_PREVIEWS = 50
MAX_SEED = 2**64 - 1
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class ImageRequest(BaseModel):
    """A request for pictures. Fields that this server does not know (quality, style, user ...) are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")
    model: str | None = Field(None, max_length=256, description="One of GET /v1/models; the first if none is given.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="How many pictures; their seeds count on. [1]")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT in pixels, within what GET /v1/models says, or `auto`: the model's own.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`url` is kept in memory for a while and is then gone. [b64_json]"
    )
    output_format: Literal["png"] | None = Field(None, description="Pictures are PNGs.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the first picture; random if none is given.")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT, description="What not to draw.")
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="[the model's own]")
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, ge=0, le=MAX_GUIDANCE, description="[the model's own]"
    )
    stream: bool | None = Field(None, description="Answer with server-sent events: steps, previews, pictures.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PREVIEWS, description="Previews of each picture in the stream, evenly over its steps. [0]"
    )


class Image(BaseModel):
    """One picture: base64 of a PNG, or where it lies."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Timing(BaseModel):
    """Seconds that the first picture waited for its batch, and that all took together."""

    wait: float
    total: float


class ImageResponse(BaseModel):
    created: int
    data: list[Image]
    model: str
    size: str
    output_format: Literal["png"] = "png"
    timing: Timing


class Model(BaseModel):
    """A model as OpenAI lists it, with what it takes. `sizes` has no entry for a model of one size."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "obsdiff"
    ready: bool
    identity: str | None = None
    backend: str | None = None
    size: str | None = None
    sizes: dict[str, dict[str, int]] = {}
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_batch_size: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    """`models` says of each whether it is ready."""

    status: Literal["live", "ready", "starting", "draining"]
    models: dict[str, bool] = {}


def pixels(size: str | None, info: Info) -> tuple[int, int]:
    """Height and width of a request's `WIDTHxHEIGHT`. Raises ApiError 400 with the range for what cannot be drawn."""
    found = SIZE.fullmatch(size or "")
    if not found:
        return info.height, info.width
    width, height = map(int, found.groups())
    if not info.sides and (height, width) != (info.height, info.width):
        own = f"{info.width}x{info.height}"
        raise ApiError(400, "invalid_size", f"size {size}: this model draws {own} alone", "size")
    for axis, value in (("height", height), ("width", width)):
        side = info.sides.get(axis)
        if side and not (side.min <= value <= side.max and value % side.step == 0):
            message = f"{axis} {value} is outside what the bundle was exported for: {side.words}"
            raise ApiError(400, "invalid_size", message, "size")
    return height, width


def describe(name: str, created: int, info: Info | None, ready: bool) -> Model:
    """A model for the list."""
    if info is None:
        return Model(id=name, created=created, ready=ready)
    return Model(
        id=name,
        created=created,
        ready=ready,
        identity=info.identity,
        backend=info.backend,
        size=f"{info.width}x{info.height}",
        sizes={axis: {"min": side.min, "max": side.max, "step": side.step} for axis, side in info.sides.items()},
        num_inference_steps=info.steps,
        guidance_scale=info.guidance,
        max_batch_size=info.max_batch,
    )


def first_error(errors: list[Any]) -> ApiError:
    """A request that fits no schema, as one sentence about the first thing that is wrong with it."""
    where = [str(part) for part in errors[0]["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where)[:80].encode("ascii", "replace").decode() or None
    message = f"{param or 'the body'}: {errors[0]['msg']}"
    return ApiError(400, "invalid_request", message, param)
