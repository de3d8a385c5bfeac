"""What TensorRT says: kept in order, told to the user once, and read for what it says of sparsity."""

import json
import re
import sys
from collections import deque
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from obsdiff.errors import ObsdiffError

SPARSITY = "(Sparsity)"
ELIGIBLE = re.compile(r"\(Sparsity\) (?:Found (\d+) layer\(s\) eligible|Layers eligible)[^:]*(?::(.*))?$", re.S)
PICKED = re.compile(r"\(Sparsity\) (?:Chose (\d+) layer\(s\)|[^:]*picked sparse implementation)[^:]*(?::(.*))?$", re.S)
"""TensorRT 10 and later say `Found 2 layer(s) eligible to use sparse tactics: a, b` and `Chose ...`, earlier ones
`Layers eligible for sparse math: a, b` and `TRT inference plan picked sparse implementation for layers: a`."""


class Message(NamedTuple):
    severity: int
    text: str


@cache
def get_logger(trt: Any) -> Any:
    """The one logger of a library (`tensorrt` or `tensorrt_rtx`): it takes no second one in a process.

    `messages` holds the newest errors, warnings and words on sparsity. Clear it before a call whose words you want.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[Message] = deque(maxlen=1000)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(trt.ILogger.WARNING) or SPARSITY in text:
                self.messages.append(Message(int(severity), text))

    return Logger()


def start(kind: Any, logger: Any, title: str) -> Any:
    """A Builder or a Runtime of the library. Raises ObsdiffError with its reason, such as a driver that is too old."""
    logger.messages.clear()
    try:
        return kind(logger)
    except TypeError:  # what the bindings make of a null pointer
        raise ObsdiffError(f"{title} does not start: {say_errors(logger.messages)}") from None


def say_errors(messages: Iterable[Message], limit: int = 400) -> str:
    """The library's errors, each once, in order, without its own file names; its warnings where it gives no error."""
    messages = list(messages)
    errors = [message.text for message in messages if message.severity <= 1]
    texts = errors or [message.text for message in messages if SPARSITY not in message.text]
    said = "; ".join(dict.fromkeys(_shorten(text) for text in texts)) or "it does not say why"
    return said if len(said) <= limit else f"{said[: limit - 3]}..."


def _shorten(text: str) -> str:
    text = re.sub(r"^.*?Error Code \d+: ", "", " ".join(text.split()))
    text = re.sub(r"\s*\bIn \S+ at \S+:\d+", "", text)
    return re.sub(r"\[\w+\.\w+:\d+: \w+\] ", "", text).removesuffix(".")


def sparsity_lines(messages: Iterable[Message]) -> tuple[list[str], list[str]]:
    """Names of the layers that could run sparse, and of those for which a sparse kernel was picked.

    Of several passes over the tactics the last counts: that is the engine's.
    """
    (_, eligible), (_, picked) = _sparsity(messages)
    return eligible, picked


def sparsity_counts(messages: Iterable[Message]) -> tuple[int | None, int | None]:
    """How many layers could run sparse and do; None where the log says nothing. A log may count without naming."""
    (eligible, _), (picked, _) = _sparsity(messages)
    return eligible, picked


def _sparsity(messages: Iterable[Message]) -> list[tuple[int | None, list[str]]]:
    found: list[tuple[int | None, list[str]]] = [(None, []), (None, [])]
    for message in messages:
        for i, pattern in enumerate((ELIGIBLE, PICKED)):
            if match := pattern.search(message.text):
                names = [name.strip() for name in (match[2] or "").split(",") if name.strip()]
                count = int(match[1]) if match[1] else len(names)
                # The same pass may be told twice, in full only to those who want every word.
                if names or count != found[i][0]:
                    found[i] = count, names
    return found


def inspector_layers(engine: Any) -> list[dict[str, Any]]:
    """An engine's layers as TensorRT's inspector tells them: everything where it was built with detailed verbosity,
    at least their names ("Name")."""
    trt = sys.modules[type(engine).__module__]
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):  # TensorRT writes its JSON by hand
        return []
    return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]


def node_modules(graph: Path) -> dict[str, str]:
    """The module that each node of an ONNX graph comes from, by the node's name: torch's exporter writes it there."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    found = {}
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        paths = re.findall(r"'([^']*)'", scopes)[:-1]  # the last is the operation
        found[node.name] = paths[-1].removeprefix("denoiser").lstrip(".") if paths else ""
    return found


def name_modules(text: str, graph: Path) -> str:
    """Adds to an error what the user knows: the module behind each node that it names."""
    modules = node_modules(graph)
    named = [name for name in dict.fromkeys(re.findall(r"[\w./:-]+", text)) if modules.get(name)]
    return text + "".join(f"; {name} is of the module {modules[name]}" for name in named[:2])
