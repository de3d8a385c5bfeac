"""Two files of `obsdiff bench --out` beside each other: what got faster, and what else was different."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from obsdiff.errors import InputError, first_problem
from obsdiff.files import read_json
from obsdiff.measure.ratios import median_ratio

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Key = tuple[str, str, int]


class Row(BaseModel):
    """What a comparison needs of a row; whatever else it has is left alone."""

    path: str = Field(min_length=1)
    backend: str
    median_ms: Positive
    p90_ms: Positive
    images_per_second: Positive
    runs_ms: list[Positive] = Field(min_length=1)
    peak_memory_bytes: int | None = None


class Bench(BaseModel):
    kind: Literal["bench"]
    environment: dict[str, str]
    settings: dict[str, Any]
    warnings: list[str] = []
    interrupted: bool = False
    results: list[Row] = Field(min_length=1)


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Rows of both files by the name of their path (without its folders) and their backend.

    Returns `rows` (path, backend, both medians, both peaks of memory, `ratio`: how many times as fast b is, and
    `ratio_interval`), `only_a` and `only_b` (what the other has not), and `differences`: sentences about machine,
    versions and settings. Raises InputError for a file that is no bench, and for two that have no row in common.
    """
    first, second = read_bench(a), read_bench(b)
    rows_a, rows_b = keyed(first), keyed(second)
    if not rows_a.keys() & rows_b.keys():
        names = [", ".join(_words(key) for key in rows) for rows in (rows_a, rows_b)]
        raise InputError(f"{a} and {b} have no path and backend in common: {names[0]} against {names[1]}")
    rows = []
    for key in (key for key in rows_a if key in rows_b):
        one, other = rows_a[key], rows_b[key]
        ratio, interval = median_ratio(one.runs_ms, other.runs_ms)
        rows.append(
            {
                "path": key[0],
                "backend": key[1],
                "median_ms": [one.median_ms, other.median_ms],
                "p90_ms": [one.p90_ms, other.p90_ms],
                "images_per_second": [one.images_per_second, other.images_per_second],
                "peak_memory_bytes": [one.peak_memory_bytes, other.peak_memory_bytes],
                "ratio": ratio,
                "ratio_interval": interval and list(interval),
            }
        )
    return {
        "kind": "comparison",
        "a": str(a),
        "b": str(b),
        "rows": rows,
        "only_a": [_words(key) for key in rows_a if key not in rows_b],
        "only_b": [_words(key) for key in rows_b if key not in rows_a],
        "differences": [
            *_differences("settings", first.settings, second.settings),
            *_differences("environment", first.environment, second.environment),
            *(f"{path} was interrupted" for path, side in ((a, first), (b, second)) if side.interrupted),
            *(f"{path}: {warning}" for path, side in ((a, first), (b, second)) for warning in side.warnings),
        ],
    }


def read_bench(path: Path) -> Bench:
    """The file, checked. Raises InputError."""
    try:
        return Bench.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path} is no file of obsdiff bench PATH... --out: {first_problem(error)}") from None


def keyed(bench: Bench) -> dict[Key, Row]:
    """The rows by name, backend, and which of that name and backend it is."""
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[Key, Row] = {}
    for row in bench.results:
        name = (PurePath(row.path).name or row.path, row.backend)
        found[(*name, seen[name])] = row
        seen[name] += 1
    return found


def _words(key: Key) -> str:
    return f"{key[0]} on {key[1]}"


def _differences(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield f"{what}: {name} is {a.get(name, 'not there')} and {b.get(name, 'not there')}"
