"""What Triton's Python backend runs: prompts and seeds in, pictures out, by the engine of `obsdiff serve`.

Imported inside Triton alone: triton_python_backend_utils is a module of its own. torch waits until `initialize`, since
Triton imports a model once more to ask what it takes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.runtime.server.errors import ApiError
from obsdiff.runtime.server.messages import Info, Key, Settings
from obsdiff.runtime.server.schemas import MAX_GUIDANCE, MAX_PROMPT, MAX_STEPS, pixels

LARGEST = 99999  # pixels that `pixels` reads; what the bundle draws is less


@dataclass(frozen=True)
class Row:
    """One picture of a request."""

    prompt: str
    seed: int
    key: Key


class TritonPythonModel:
    """One instance of the model, with an engine of its own. Triton calls it from one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Verifies and loads the bundle, and warms it up: the server is ready after that."""
        from obsdiff.export.bundle import read_manifest
        from obsdiff.runtime.server.engine import Engine

        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        device = given.get("device")
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        most = max(1, config["max_batch_size"])
        folder = Path(args["model_repository"]) / args["model_version"] / given["bundle"]
        _check_numpy()
        try:
            read_manifest(folder)  # the engine would take a model or a checkpoint as well
            self.engine = Engine(Settings(str(folder), given.get("backend", "auto"), device, most))
            if self.engine.max_batch < most:
                raise InputError(f"max_batch_size {most}: {folder} draws {self.engine.max_batch} pictures at once")
            self.info = self.engine.warm_up()
        except ObsdiffError as error:
            raise triton.TritonModelException(str(error)) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request: its pictures, or an error of its own. Rows that can share a batch do."""
        asked = [self._read(request) for request in requests]
        groups: dict[Key, list[tuple[int, int]]] = {}
        for i, rows in enumerate(asked):
            for j, row in enumerate([] if isinstance(rows, InputError) else rows):
                groups.setdefault(row.key, []).append((i, j))
        drawn: dict[tuple[int, int], Any] = {}
        for places in groups.values():
            rows = [asked[i][j] for i, j in places]  # type: ignore[index]
            drawn |= zip(places, self._draw(rows, [requests[i] for i, _ in places]), strict=True)
        return [
            _answer([rows] if isinstance(rows, InputError) else [drawn[i, j] for j in range(len(rows))])
            for i, rows in enumerate(asked)
        ]

    def _read(self, request: Any) -> list[Row] | InputError:
        tensors = {name: _values(request, name) for name in NAMES}
        try:
            rows = [
                _row({name: values[j] for name, values in tensors.items() if values is not None}, self.info)
                for j in range(len(tensors["prompt"] or []))
            ]
            if len({(row.key.height, row.key.width) for row in rows}) > 1:
                raise InputError("the pictures of one request must have one height and one width")
        except InputError as error:
            return error
        return rows

    def _draw(self, rows: Sequence[Row], requests: Sequence[Any]) -> list[Any]:
        """For each row uint8 [h, w, 3], an exception, or None where the client went away."""
        from obsdiff.runtime.server.engine import Watch

        watch = Watch(gone=lambda: {k for k, request in enumerate(requests) if request.is_cancelled()})
        try:
            images = self.engine.draw([row.prompt for row in rows], [row.seed for row in rows], rows[0].key, watch)
        except (
            InputError
        ) as error:  # a prompt that one of them may not have (a class that there is not): not all suffer
            if len(rows) == 1:
                return [error]
            return [self._draw([row], [request])[0] for row, request in zip(rows, requests, strict=True)]
        except Exception as error:  # the server goes on, and says what happened
            return [error] * len(rows)
        return [np.asarray(images[k].convert("RGB")) if k in images else None for k in range(len(rows))]


def _check_numpy() -> None:
    """Refuses the numpy that makes older Tritons read every array wrongly and die of the first prompt.

    They were built for numpy 1 (triton-inference-server/python_backend, pull request 384).
    """
    import torch

    values = torch.arange(4)
    if triton.Tensor.from_dlpack("check", values).as_numpy().tolist() != values.tolist():
        raise triton.TritonModelException(
            f"this Triton was built for numpy 1 and its Python has numpy {np.__version__}: "
            "take a newer Triton, or give its Python a numpy<2"
        )


NAMES = ("prompt", "seed", "negative_prompt", "steps", "guidance_scale", "height", "width")


def _values(request: Any, name: str) -> list[Any] | None:
    tensor = triton.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if values.dtype == np.float32:
        return [float(str(value)) for value in values]  # 3.3 as everywhere else, not 3.299999952316284
    return values.tolist()


def _row(given: Mapping[str, Any], info: Info) -> Row:
    """A picture's options within the limits of `obsdiff serve`, the model's own for those that are not given."""
    for name, low, high in (
        ("steps", 1, MAX_STEPS),
        ("guidance_scale", 0, MAX_GUIDANCE),
        ("height", 1, LARGEST),
        ("width", 1, LARGEST),
    ):
        if name in given and not low <= given[name] <= high:  # NaN is nowhere in between
            raise InputError(f"{name} {given[name]:g} is out of range: it must lie between {low} and {high}")
    try:
        height, width = pixels(f"{given.get('width', info.width)}x{given.get('height', info.height)}", info)
    except ApiError as error:
        raise InputError(error.message) from None
    negative = _text(given, "negative_prompt") if "negative_prompt" in given else None
    key = Key(height, width, given.get("steps", info.steps), given.get("guidance_scale", info.guidance), negative)
    return Row(_text(given, "prompt"), given["seed"], key)


def _text(given: Mapping[str, Any], name: str) -> str:
    try:
        text = given[name].decode()
    except UnicodeDecodeError:
        raise InputError(f"the {name.replace('_', ' ')} is not valid UTF-8") from None
    if len(text) > MAX_PROMPT:
        raise InputError(f"the {name.replace('_', ' ')} has {len(text)} characters: at most {MAX_PROMPT} are taken")
    return text


def _answer(results: Sequence[Any]) -> Any:
    """The pictures as uint8 [batch, h, w, 3], or the first error as Triton's."""
    for result in results:
        if result is None:
            return _error("the client went away", triton.TritonError.CANCELLED)
        if isinstance(result, InputError):
            return _error(str(result), triton.TritonError.INVALID_ARG)
        if isinstance(result, ObsdiffError):
            return _error(str(result), triton.TritonError.INTERNAL)
        if isinstance(result, Exception):
            sentence = " ".join(f"{type(result).__name__}: {result}".split())[:500]
            return _error(sentence, triton.TritonError.INTERNAL)
    return triton.InferenceResponse([triton.Tensor("image", np.stack(results))])


def _error(sentence: str, code: Any) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(sentence, code))
