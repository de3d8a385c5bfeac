"""The model.py that obsdiff triton writes, run as Triton runs it, with stand-ins for the names that Triton gives it.

test_triton_server.py does the same with a real server, where there is one.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import model_config
import numpy as np
import pytest

from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.triton import INPUTS, write_repository

PROMPT = "a red ankle boot"
KINDS = {"prompt": object, "negative_prompt": object, "guidance_scale": np.float32}


class TritonModelException(Exception):
    pass


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array

    @classmethod
    def from_dlpack(cls, name: str, value: Any) -> "Tensor":
        return cls(name, np.from_dlpack(value))


@dataclass
class TritonError:
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"
    message: str
    code: str


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Request:
    """A request with a row for each prompt; `gone` says how often it may be asked before its client goes away."""

    tensors: dict[str, Tensor]
    patience: int | None = None

    def is_cancelled(self) -> bool:
        if self.patience is None:
            return False
        self.patience -= 1
        return self.patience < 0


def ask(*prompts: str | bytes, patience: int | None = None, **options: Any) -> Request:
    """A request; an option that is a list has a value for each row."""
    columns = {"prompt": list(prompts), "seed": 0, "steps": 2, **options}
    tensors = {}
    for name, given in columns.items():
        values = given if isinstance(given, list) else [given] * len(prompts)
        values = [value.encode() if isinstance(value, str) else value for value in values]
        tensors[name] = Tensor(name, np.array(values, dtype=KINDS.get(name, np.int64)).reshape(-1, 1))
    return Request(tensors, patience)


@pytest.fixture(scope="module")
def backend() -> Iterator[ModuleType]:
    """Triton's module, as far as a model uses it."""
    names = {kind.__name__: kind for kind in (Tensor, TritonError, InferenceResponse, TritonModelException)}
    module = ModuleType("triton_python_backend_utils")
    vars(module).update(names, get_input_tensor_by_name=lambda request, name: request.tensors.get(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", module)
        yield module
    sys.modules.pop("obsdiff.runtime.triton_model", None)


def start(model: Path, **changes: Any) -> Any:
    """The model's instance, initialised as Triton does it."""
    spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = model_config.parse((model / "config.pbtxt").read_text())
    config["parameters"] = {entry["key"]: entry["value"] for entry in config["parameters"]}
    instance = module.TritonPythonModel()
    instance.initialize(
        {
            "model_config": json.dumps({**config, **changes}),
            "model_repository": str(model),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    return instance


@pytest.fixture(scope="module")
def model(backend: ModuleType, graphless: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    repo = tmp_path_factory.mktemp("repo")
    write_repository(graphless, repo, name="m", device="cpu", max_batch_size=4, copy=True)
    return start(repo / "m")


@pytest.fixture(scope="module")
def expected(graphless: Path) -> Any:
    """Draws as `obsdiff run` does: uint8 [h, w, 3]."""
    pipe = load(graphless, device="cpu")

    def draw(prompt: str, seed: int = 0, **overrides: Any) -> np.ndarray:
        options = call_options(pipe, graphless, {"num_inference_steps": 2, **overrides})
        return np.asarray(generate(pipe, [prompt], [seed], options)[0])

    return draw


def pictures(response: InferenceResponse) -> np.ndarray:
    assert response.error is None, response.error
    (tensor,) = response.output_tensors
    assert tensor.name == "image"
    return tensor.array


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Within a level of 8 bits, what a batch may change."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def test_a_picture_is_what_the_command_draws(model: Any, expected: Any) -> None:
    (response,) = model.execute([ask(PROMPT, seed=7)])
    drawn = pictures(response)
    assert (drawn.shape, drawn.dtype) == ((1, 32, 32, 3), np.uint8)
    assert same(drawn[0], expected(PROMPT, 7))
    assert not same(drawn[0], expected(PROMPT, 8))


def test_every_option_counts(model: Any, expected: Any) -> None:
    options = {"steps": 3, "guidance_scale": 2.3, "height": 24, "width": 40, "negative_prompt": "a blue bag"}
    assert {"prompt", "seed", *options} == set(INPUTS)
    (response,) = model.execute([ask(PROMPT, **options)])
    names = {"num_inference_steps": options.pop("steps"), **options}
    assert same(pictures(response)[0], expected(PROMPT, **names))
    for name in names:
        assert not same(pictures(response)[0], expected(PROMPT, **{**names, name: None}))


def test_requests_are_joined_where_they_can_be_and_each_gets_its_own(
    model: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    draw = model.engine.draw
    monkeypatch.setattr(model.engine, "draw", lambda prompts, *rest: batches.append(prompts) or draw(prompts, *rest))
    answers = model.execute(
        [ask(PROMPT, "teal trousers", seed=[1, 2]), ask("a blue bag", steps=3), ask("une botte à lacets", seed=-3)]
    )
    assert batches == [[PROMPT, "teal trousers", "une botte à lacets"], ["a blue bag"]]
    first, second, third = (pictures(answer) for answer in answers)
    assert first.shape == (2, 32, 32, 3)
    assert same(first[0], expected(PROMPT, 1))
    assert same(first[1], expected("teal trousers", 2))
    assert same(second[0], expected("a blue bag", num_inference_steps=3))
    assert same(third[0], expected("une botte à lacets", -3))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ask(PROMPT, steps=0), "steps 0"),
        (ask(PROMPT, steps=10**9), "between 1 and"),
        (ask(PROMPT, guidance_scale=float("nan")), "guidance_scale nan"),
        (ask(PROMPT, guidance_scale=float("inf")), "guidance_scale inf"),
        (ask(PROMPT, guidance_scale=-1.0), "guidance_scale -1"),
        (ask(PROMPT, height=20), "16 to 48 pixels in steps of 8"),
        (ask(PROMPT, width=4096), "width 4096"),
        (ask(PROMPT, width=-8), "width -8"),
        (ask(PROMPT, height=2**62), "height"),
        (ask(b"\xff"), "the prompt is not valid UTF-8"),
        (ask(PROMPT, negative_prompt=b"\xff"), "the negative prompt is not valid UTF-8"),
        (ask("x" * 10_000), "10000 characters"),
        (ask(PROMPT, PROMPT, height=[32, 48]), "one height and one width"),
    ],
    ids=range(13),
)
def test_a_bad_request_gets_its_sentence_and_spoils_no_other(
    model: Any, expected: Any, bad: Request, words: str
) -> None:
    refused, good = model.execute([bad, ask(PROMPT)])
    assert refused.error.code == TritonError.INVALID_ARG
    assert words in refused.error.message
    assert "\n" not in refused.error.message
    assert same(pictures(good)[0], expected(PROMPT))


def test_a_prompt_that_the_pipeline_refuses_spoils_no_other(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from obsdiff.errors import InputError

    draw = model.engine.draw

    def picky(prompts: list[str], *rest: Any) -> Any:
        if "unicorn" in prompts:
            raise InputError("there is no class unicorn")
        return draw(prompts, *rest)

    monkeypatch.setattr(model.engine, "draw", picky)
    good, refused = model.execute([ask(PROMPT), ask("unicorn")])
    assert refused.error == TritonError("there is no class unicorn", TritonError.INVALID_ARG)
    assert pictures(good).shape == (1, 32, 32, 3)


def test_what_breaks_is_told_and_the_model_goes_on(model: Any, expected: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "draw", lambda *_: 1 / 0)
        (response,) = model.execute([ask(PROMPT)])
    assert response.error == TritonError("ZeroDivisionError: division by zero", TritonError.INTERNAL)
    assert same(pictures(model.execute([ask(PROMPT)])[0])[0], expected(PROMPT))


@pytest.mark.parametrize("patience", [0, 1])
def test_a_client_that_went_away_leaves_the_batch(model: Any, expected: Any, patience: int) -> None:
    steps = {"steps": 4}
    gone, stays = model.execute([ask(PROMPT, **steps, patience=patience), ask("a blue bag", **steps)])
    assert gone.error.code == TritonError.CANCELLED
    assert same(pictures(stays)[0], expected("a blue bag", num_inference_steps=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_batch_size": 999}, ("max_batch_size 999", "8 pictures")),
        ({"parameters": {"bundle": {"string_value": "nowhere"}}}, ("nowhere", "does not exist")),
        ({"parameters": {"bundle": {"string_value": "/"}}}, ("not a bundle",)),
    ],
    ids=("batch", "missing", "other"),
)
def test_a_model_that_cannot_work_says_why_when_it_is_loaded(
    model: Any, graphless: Path, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    write_repository(graphless, tmp_path, name="m", device="cpu")
    with pytest.raises(TritonModelException) as raised:
        start(tmp_path / "m", **change)
    for word in words:
        assert word in str(raised.value)


def test_the_numpy_that_older_tritons_die_of_is_refused(
    model: Any, graphless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(graphless, tmp_path, name="m", device="cpu")
    seen = SimpleNamespace(as_numpy=lambda: np.zeros(4, dtype=np.int64))  # what Triton 2.51 makes of 0, 1, 2, 3
    monkeypatch.setattr(Tensor, "from_dlpack", lambda *_: seen)
    with pytest.raises(TritonModelException, match="built for numpy 1"):
        start(tmp_path / "m")
