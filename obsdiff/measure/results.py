"""Results that other commands left on disk, read with care: those of bench and of eval."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from obsdiff.errors import InputError, first_problem
from obsdiff.files import read_json

EVAL = "eval.json"  # what makes a folder the result of an eval
SIDE = 512  # pixels: no picture on a page is larger
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


Number = Annotated[float | None, BeforeValidator(_finite)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Environment = dict[str, Annotated[str, BeforeValidator(_text)]]


class Row(BaseModel):
    """One path of a bench: milliseconds of a batch, and the medians of its stages."""

    path: str = Field(min_length=1)
    backend: str
    median_ms: Positive
    p90_ms: Positive
    stages_ms: dict[str, Number] = {}
    images_per_second: Positive
    peak_memory_bytes: int | None = None


class Bench(BaseModel):
    kind: Literal["bench"] = "bench"
    environment: Environment
    settings: dict[str, Any]
    results: list[Row] = Field(min_length=1)


class Metric(BaseModel):
    """A figure of quality over that many images, with its interval where one is known."""

    value: Number
    low: Number = None
    high: Number = None
    images: int = Field(ge=0)
    better: Literal["lower", "higher"]


class Drawn(BaseModel):
    """One path of an eval. `images` are files relative to its folder, one a prompt, in the order of the prompts."""

    path: str = Field(min_length=1)
    backend: str = ""
    metrics: dict[str, Metric] = {}
    images: list[str] = []


class Settings(BaseModel, extra="allow"):
    prompts: list[str] = Field(min_length=1)
    seeds: list[int]


class Gate(BaseModel):
    metric: str
    path: str
    limit: Number
    value: Number
    met: bool


class Eval(BaseModel):
    kind: Literal["eval"]
    environment: Environment
    settings: Settings
    reference: Drawn
    results: list[Drawn]
    skipped: dict[str, str] = {}
    gates: list[Gate] = []


Model = TypeVar("Model", bound=BaseModel)


def read_result(path: Path) -> Bench | Eval:
    """What `obsdiff bench --out` or `obsdiff eval --out` wrote. Raises InputError that names the file."""
    value = read_json(path)
    kind = value.get("kind", "bench") if isinstance(value, dict) else None  # bench --json > FILE has no kind
    if kind not in ("bench", "eval"):
        raise InputError(
            f"{path} is JSON of another kind: it must be a result of obsdiff bench PATH... or obsdiff eval"
        )
    if kind == "bench":
        return _validate(Bench, value, path, "a result of obsdiff bench PATH...")
    found = _validate(Eval, value, path, "a result of obsdiff eval")
    count = len(found.settings.prompts)
    if len(found.settings.seeds) != count:
        raise InputError(f"{path} has {count} prompts and {len(found.settings.seeds)} seeds: it needs one each")
    for side in (found.reference, *found.results):
        if len(side.images) > count:
            raise InputError(f"{path} names {len(side.images)} pictures of {side.path} for {count} prompts")
    return found


def read_picture(folder: Path, name: str, origin: Path) -> Image.Image:
    """An RGB picture of at most SIDE pixels a side. Raises InputError where it leaves `folder` or cannot be read."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{origin}: the picture {name} lies outside of {folder}")
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return fit(image)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{origin}: the picture {path} is missing") from None
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{origin}: the picture {path} cannot be read: {error}") from None


def fit(image: Image.Image) -> Image.Image:
    """The picture in RGB, scaled down where a side is over SIDE pixels."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _validate(model: type[Model], value: Any, path: Path, words: str) -> Model:
    try:
        return model.model_validate(printable(value))
    except ValidationError as error:
        raise InputError(f"{path} is not {words}: {first_problem(error)}") from None


def printable(value: Any) -> Any:
    """The value with control characters and lone surrogates, which no page can hold, replaced in every text."""
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [printable(entry) for entry in value]
    return UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) else value
