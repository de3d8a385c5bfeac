"""Everything that decides what a prune produces; saved with the checkpoint, compared on resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obsdiff.errors import InputError
from obsdiff.gemm_times import GemmTable, read_table
from obsdiff.models.source import DATA, EMBEDDED, Source
from obsdiff.prune.base import Lora, record_loras
from obsdiff.prune.solvers.patterns import NM, Pattern, Unstructured, parse_nm

PACKAGES = 4
STRUCTURED = "structured"
Weighting = Literal["log-decrease", "log-increase", "linear-decrease", "linear-increase", "uniform"]


class Recipe(BaseModel):
    """Shares lie between 0 and 1; sizes are pixels. Shares and blocks left out are filled in by the pattern.

    With `only_faster` the prune fills in `gemm_table`, where none is given, and `left_dense`: the names of the layers
    that stay dense by it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = "2:4"
    sparsity: float | None = None
    heads: float | None = Field(None, ge=0, lt=1)
    neurons: float | None = Field(None, ge=0, lt=1)
    round_to: int | None = Field(None, ge=1)
    allocation: Literal["uniform", "owl", "error"] = "uniform"
    target_size: float | None = Field(None, gt=0, lt=1)
    target_speedup: float | None = Field(None, gt=1)
    solver: Literal["auto", "obs", "alps", "dsnot", "wanda", "magnitude"] = "auto"
    damping: float | None = Field(None, gt=0, allow_inf_nan=False)
    lora: tuple[Lora, ...] = ()
    prompts: tuple[str, ...] = Field(min_length=1)
    steps: int = Field(25, ge=1)
    height: int = Field(512, ge=1)
    width: int = Field(512, ge=1)
    guidance_scale: float = Field(7.0, ge=0, allow_inf_nan=False)
    call: Mapping[str, Any] = {}
    batch_size: int = Field(8, ge=1)
    calibration: Literal["sampler", "stream"] = "sampler"
    target: Literal["symmetric", "asymmetric"] = "symmetric"
    packages: int | None = Field(None, ge=1)
    offload: bool = False
    token_share: float = Field(1, gt=0, le=1)
    call_share: float = Field(1, gt=0, le=1)
    cache_gb: float = Field(8, ge=0)
    timestep_weighting: Weighting = "log-decrease"
    blocks: str = ":"
    include: str = ""
    exclude: str = ""
    only_faster: bool = False
    gemm_table: GemmTable | None = None
    left_dense: tuple[str, ...] = ()
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: str
    dtype: Literal["float32", "float16", "bfloat16"]

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        if pattern not in ("unstructured", STRUCTURED):
            try:
                parse_nm(pattern.removeprefix(f"{STRUCTURED}+"))
            except ValueError as error:
                raise ValueError(f"{error} (or write unstructured, structured, structured+2:4)") from None
        return pattern

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"--sparsity must lie between 0 and 1 (both excluded), not {self.sparsity}")
        nm = None if self.structured else self.layer_pattern
        if isinstance(nm, NM) and self.sparsity not in (None, nm.sparsity):
            raise ValueError(f"--pattern {nm} is a sparsity of {nm.sparsity:g}, not --sparsity {self.sparsity:g}")
        if self.structured and self.solver not in ("auto", "obs", "magnitude"):
            raise ValueError(f"--solver {self.solver}: structured pruning knows auto, obs and magnitude")
        if self.damping is not None and self.solver not in ("obs", "alps"):
            raise ValueError(f"--damping is an option of --solver obs and alps, not of {self.solver}")
        if self.solver == "auto" and len(self.prompts) < 2:
            raise ValueError("--solver auto holds half of the prompts out: give two or more, or choose --solver obs")
        self._check_allocation()
        if self.packages is not None and self.calibration == "stream":
            raise ValueError("--packages is an option of --calibration sampler: in a stream every block is one")
        if self.offload and self.calibration != "stream":
            raise ValueError("--offload needs --calibration stream")
        if self.offload and self.target_speedup is not None:
            raise ValueError("--target-speedup cannot be measured with --offload: leave one of them out")
        if self.target == "asymmetric" and (self.calibration != "stream" or self.pattern == STRUCTURED):
            raise ValueError("--target asymmetric needs --calibration stream and a --pattern other than structured")
        if self.call_share < 1 and self.calibration != "stream":
            raise ValueError("--call-share is an option of --calibration stream")
        steps = -(-len(self.prompts) // self.batch_size) * self.steps
        if int(steps * self.call_share) < 1:
            raise ValueError(f"--call-share {self.call_share:g} of {steps} steps is none: take {1 / steps:.2g} or more")
        if self.only_faster and self.pattern != "2:4":
            raise ValueError(f"--only-faster is for --pattern 2:4, not {self.pattern}")
        if self.gemm_table and not self.only_faster:
            raise ValueError("--gemm-table is an option of --only-faster")
        for name in ("heads", "neurons", "round_to"):
            if getattr(self, name) is not None and not self.structured:
                raise ValueError(f"{flag(name)} is an option of --pattern structured and structured+N:M")
        return self

    def _check_allocation(self) -> None:
        targets = [name for name in ("target_size", "target_speedup") if getattr(self, name) is not None]
        shares = [name for name in ("heads", "neurons") if getattr(self, name) is not None]
        for needed, given in (("--pattern structured", self.pattern), ("--allocation error", self.allocation)):
            if targets and given != needed.split()[1]:
                raise ValueError(f"{flag(targets[0])} needs {needed}, not {given}")
        if self.allocation == "owl" and self.pattern != "unstructured":
            raise ValueError("--allocation owl is for --pattern unstructured")
        if self.allocation == "error" and self.pattern not in ("unstructured", STRUCTURED):
            raise ValueError(
                "--allocation error is for --pattern unstructured and structured: N:M is the same everywhere"
            )
        if len(targets) + (bool(targets) and self.sparsity is not None) > 1:
            raise ValueError("give one of --sparsity, --target-size and --target-speedup")
        if shares and self.allocation != "uniform":
            chooser = flag(targets[0]) if targets else f"--allocation {self.allocation}"
            raise ValueError(f"{flag(shares[0])} is a share for --allocation uniform: {chooser} chooses it itself")

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
    def structured(self) -> bool:
        """Whether heads and neurons go."""
        return self.pattern.startswith(STRUCTURED)

    @property
    def layer_pattern(self) -> Pattern | None:
        """What each linear is pruned to, after heads and neurons went; None for structured pruning alone."""
        if self.pattern == STRUCTURED:
            return None
        if self.pattern == "unstructured":
            return Unstructured(self.sparsity or 0.5)
        return parse_nm(self.pattern.removeprefix(f"{STRUCTURED}+"))


def make_recipe(source: Source, options: Mapping[str, Any]) -> Recipe:
    """A Recipe from a user's options, what the model says of itself, and the paper's settings, in this order.

    `prompts` may be a file, or a sequence of captions; `num_prompts` cuts it; `gemm_table` may be a file. None counts
    as not given.
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
    if isinstance(given.get("gemm_table"), (str, Path)):
        given["gemm_table"] = read_table(Path(given["gemm_table"]))
    given["lora"] = record_loras(given.get("lora", ()))
    given["prompts"] = _choose_prompts(source, given.get("prompts"), given.pop("num_prompts", 100))
    targets = given.keys() & {"target_size", "target_speedup"}
    if targets:
        given.setdefault("pattern", STRUCTURED)
        given.setdefault("allocation", "error")  # whatever the solver: no other allocation meets a target
    if given.get("solver", "auto") == "auto" and given.get("pattern") in ("unstructured", STRUCTURED):
        uniform = given.keys() & {"heads", "neurons"}
        given.setdefault("allocation", "uniform" if uniform else "error")
    if str(given.get("pattern")).startswith(STRUCTURED):
        given.setdefault("blocks", "1:-1")  # the paper leaves the first and the last block alone
        if not targets:
            given.setdefault("sparsity", 0.3)
    elif given.get("pattern") == "unstructured":
        given.setdefault("sparsity", 0.5)
    try:
        return Recipe(**given)
    except ValidationError as error:
        raise InputError("; ".join(dict.fromkeys(_say(problem) for problem in error.errors()))) from None


def flag(name: str) -> str:
    """An option's name as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def read_prompts(path: Path) -> list[str]:
    """Captions from a text file (one a line) or JSON lines (strings, or objects with prompt, caption or text).

    Raises InputError that names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
    if given is None and source.spec.prompts:
        given = source.spec.prompts
    elif given is None:
        given = DATA / "prompts" / ("fashion.txt" if source.path in EMBEDDED.values() else "general.txt")
    prompts = read_prompts(Path(given)) if isinstance(given, (str, Path)) else list(given)
    return tuple(prompts[:count])


def _say(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "no such option"
    return f"{flag(problem['loc'][0])}: {message}" if problem["loc"] else message
