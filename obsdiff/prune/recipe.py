"""Everything that decides what a prune produces; saved with the checkpoint, compared on resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obsdiff.errors import InputError
from obsdiff.models.source import DATA, EMBEDDED, Source
from obsdiff.prune.solvers.patterns import NM, Pattern, Unstructured, parse_nm

Weighting = Literal["log-decrease", "log-increase", "linear-decrease", "linear-increase", "uniform"]


class Recipe(BaseModel):
    """Shares lie between 0 and 1; sizes are pixels. Shares and blocks left out are filled in by the pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = "2:4"
    sparsity: float | None = None
    heads: float | None = Field(None, ge=0, lt=1)
    neurons: float | None = Field(None, ge=0, lt=1)
    round_to: int | None = Field(None, ge=1)
    solver: Literal["obs", "wanda", "magnitude"] = "obs"
    damping: float = Field(0.01, gt=0)
    prompts: tuple[str, ...] = Field(min_length=1)
    steps: int = Field(25, ge=1)
    height: int = Field(512, ge=1)
    width: int = Field(512, ge=1)
    guidance_scale: float = Field(7.0, ge=0)
    call: Mapping[str, Any] = {}
    batch_size: int = Field(8, ge=1)
    packages: int = Field(4, ge=1)
    timestep_weighting: Weighting = "log-decrease"
    blocks: str = ":"
    include: str = ""
    exclude: str = ""
    seed: int = 0
    device: str
    dtype: Literal["float32", "float16", "bfloat16"]

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        if pattern not in ("unstructured", "structured"):
            try:
                parse_nm(pattern)
            except ValueError as error:
                raise ValueError(f"{error} (or write unstructured, structured)") from None
        return pattern

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        structured = self.pattern == "structured"
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must lie between 0 and 1 (both excluded), not {self.sparsity}")
        if ":" in self.pattern and self.sparsity not in (None, (implied := parse_nm(self.pattern).sparsity)):
            raise ValueError(f"{self.pattern} is a sparsity of {implied:g}, not {self.sparsity}")
        if structured and self.solver not in ("obs", "magnitude"):
            raise ValueError("structured pruning knows the solvers obs and magnitude")
        for name in ("heads", "neurons", "round_to"):
            if getattr(self, name) is not None and not structured:
                raise ValueError(f"{name} is an option of --pattern structured")
        return self

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline is called with during calibration."""
        return {
            **self.call,
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
        }

    @property
    def layer_pattern(self) -> Pattern | None:
        """What each linear is pruned to; None for structured pruning."""
        if self.pattern == "structured":
            return None
        if self.pattern == "unstructured":
            return Unstructured(self.sparsity or 0.5)
        return NM(*map(int, self.pattern.split(":")))


def make_recipe(source: Source, options: Mapping[str, Any]) -> Recipe:
    """A Recipe from a user's options, what the model says of itself, and the paper's settings, in this order.

    `prompts` may be a file, or a sequence of captions; `num_prompts` cuts it. None counts as not given.
    Raises InputError that names every option that is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    defaults = dict(source.defaults)
    fallbacks = {
        "steps": defaults.pop("num_inference_steps", None),
        **{name: defaults.pop(name, None) for name in ("height", "width", "guidance_scale")},
        "call": defaults,
    }
    given = {name: value for name, value in fallbacks.items() if value is not None} | given
    given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    given.setdefault("dtype", "float32" if given["device"] == "cpu" else "bfloat16")
    given["prompts"] = _choose_prompts(source, given.get("prompts"), given.pop("num_prompts", 100))
    if given.get("pattern") == "structured":
        given.setdefault("blocks", "1:-1")  # the paper leaves the first and the last block alone
        given.setdefault("sparsity", 0.3)
    elif given.get("pattern") == "unstructured":
        given.setdefault("sparsity", 0.5)
    try:
        return Recipe(**given)
    except ValidationError as error:
        raise InputError("; ".join(_say(problem) for problem in error.errors())) from None


def read_prompts(path: Path) -> list[str]:
    """Captions from a text file (one a line) or JSON lines (strings, or objects with prompt, caption or text).

    Raises InputError that names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts file {path} cannot be read: {error}") from None
    prompts = [
        _parse_prompt(line, f"{path}, line {number}") if path.suffix in (".jsonl", ".ndjson") else line.strip()
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InputError(f"the prompts file {path} holds no prompt")
    return prompts


def _parse_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if isinstance(value, dict):
        value = next((value[key] for key in ("prompt", "caption", "text") if key in value), None)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: needs a string, or an object with a prompt, caption or text")
    return value.strip()


def _choose_prompts(source: Source, given: Any, count: int) -> tuple[str, ...]:
    if count < 1:
        raise InputError(f"--num-prompts must be at least 1, not {count}")
    if given is None:
        given = DATA / "prompts" / ("fashion.txt" if source.path in EMBEDDED.values() else "general.txt")
    prompts = read_prompts(Path(given)) if isinstance(given, (str, Path)) else list(given)
    return tuple(prompts[:count])


def _say(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "no such option"
    return f"{where.replace('_', '-')}: {message}" if where else message
