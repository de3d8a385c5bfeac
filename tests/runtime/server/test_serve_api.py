"""The HTTP interface of a real server, asked by the real openai client."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from server import LONG, PROMPT, Server, pixels, wait_for


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


def drawn(path: Path, prompt: str, seed: int, **options: Any) -> np.ndarray[Any, Any]:
    """The picture as the bare pipeline draws it, alone."""
    pipe = load(path, "torch", "cpu")
    (image,) = generate(pipe, [prompt], [seed], call_options(pipe, path, options))
    return np.asarray(image, dtype=np.int16)


def test_openais_client_gets_the_pipelines_picture(client: openai.OpenAI, graphless: Path) -> None:
    answer = client.images.generate(
        model="plain",
        prompt=PROMPT,
        n=2,
        size="48x32",  # type: ignore[call-overload]
        response_format="b64_json",
        quality="hd",
        style="vivid",
        user="somebody",
        extra_body={"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "a bag"},
    )
    assert answer.created > 1.6e9
    assert [image.seed for image in answer.data] == [5, 6]
    assert (answer.model, answer.size, answer.output_format) == ("plain", "48x32", "png")
    for image in answer.data:
        expected = drawn(
            graphless, PROMPT, image.seed,
            num_inference_steps=3, guidance_scale=2.5, negative_prompt="a bag", height=32, width=48,
        )  # fmt: skip
        assert pixels(image.b64_json).shape == (32, 48, 3)
        assert np.abs(pixels(image.b64_json) - expected).max() <= 1


def test_who_gives_only_a_prompt_gets_the_models_own_options(client: openai.OpenAI, one_block_bundle: Path) -> None:
    answer = client.images.generate(prompt=PROMPT)
    assert answer.model == "one-block"
    (image,) = answer.data
    assert np.abs(pixels(image.b64_json) - drawn(one_block_bundle, PROMPT, image.seed)).max() <= 1
    again = client.images.generate(prompt=PROMPT, size="auto")
    assert again.data[0].seed != image.seed


def test_a_url_can_be_fetched(client: openai.OpenAI, server: Server) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 1})
    found = httpx.get(answer.data[0].url)
    same = client.images.generate(prompt=PROMPT, extra_body={"seed": 1})
    assert found.headers["content-type"] == "image/png"
    assert found.content == base64.b64decode(same.data[0].b64_json)
    assert httpx.get(f"{server.url}/v1/pictures/guess.png").status_code == 404


def test_the_models_and_what_they_take(client: openai.OpenAI, server: Server) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["one-block", "plain"]
    assert models[0].backend == "onnxruntime"
    assert models[1].backend == "torch"
    assert models[0].sizes == {axis: {"min": 16, "max": 48, "step": 8} for axis in ("height", "width")}
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError, match="there are: one-block, plain"):
        client.models.retrieve("dall-e-3")
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 300, "%ff"):
        answer = server.http.get(f"/v1/models/{name}")
        assert answer.status_code in (400, 404), name
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_stream_tells_every_step_in_order_and_then_the_picture(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 9}
        )
    )
    assert [event.type.removeprefix("image_generation.") for event in events] == [
        "step", "step", "partial_image", "step", "step", "partial_image", "step", "step", "step", "completed",
    ]  # fmt: skip
    assert [(event.step, event.total) for event in events[:-1]] == [(k, 9) for k in range(1, 10)]
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in previews] == [0, 1]
    same = client.images.generate(prompt=PROMPT, extra_body={"seed": 1, "num_inference_steps": 9})
    last = pixels(events[-1].b64_json)
    assert np.abs(last - pixels(same.data[0].b64_json)).max() <= 1
    far = [np.abs(pixels(event.b64_json) - last).mean() for event in previews]
    assert far[1] < far[0]


def test_a_stream_of_several_pictures_completes_each(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt=PROMPT, n=3, stream=True, extra_body={"num_inference_steps": 2}))
    assert sorted(event.index for event in events if event.type == "image_generation.completed") == [0, 1, 2]
    assert len(events) == 3 * (2 + 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"size": "4096x32"}, "width 4096 is outside what the bundle was exported for: 16 to 48 pixels in steps of 8"),
        ({"size": "32x20"}, "height 20 is outside what the bundle was exported for: 16 to 48 pixels in steps of 8"),
        ({"size": "-32x32"}, "size: "),
        ({"size": "32"}, "size: "),
        ({"n": 0}, "n: "),
        ({"n": 11}, "n: "),
        ({"n": True}, "n: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**64}, "seed: "),
        ({"num_inference_steps": 10**9}, "num_inference_steps: "),
        ({"guidance_scale": -1}, "guidance_scale: "),
        ({"prompt": ""}, "prompt: "),
        ({"prompt": "x" * 4001}, "prompt: "),
        ({"prompt": None}, "prompt: "),
        ({"prompt": ["a", "b"]}, "prompt: "),
        ({"response_format": "jpeg"}, "response_format: "),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_one_sentence_in_openais_shape(
    server: Server, body: dict[str, Any], words: str
) -> None:
    answer = server.draw(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(words)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == next(iter(body))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"prompt"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "guidance_scale": 1e999}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b"[" * 50000, b'{"a":' * 10000,
    ],
    ids=lambda content: content[:24].decode("latin1"),
)  # fmt: skip
def test_bodies_that_are_no_request_are_400(server: Server, content: bytes) -> None:
    answer = server.http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_odd_prompts_are_drawn(server: Server) -> None:
    for prompt in (" ", "\x00", "👢" * 500, "a\r\nb: c", "\u202eabc", "<script>", "x " * 2000):
        assert server.draw(prompt=prompt).status_code == 200, repr(prompt)


def test_an_unknown_model_is_404_and_an_unknown_route_too(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="../plain")
    assert caught.value.code == "model_not_found"
    assert server.http.get("/v1/images/generations").status_code == 405
    assert server.http.get("/v1/images/generations").headers["allow"] == "POST"
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_request_keeps_its_id_or_gets_one(server: Server) -> None:
    mine = server.http.get("/health/live", headers={"X-Request-ID": "mine-1"})
    assert mine.headers["x-request-id"] == "mine-1"
    odd = server.http.get("/health/live", headers={"X-Request-ID": "x" * 200})
    assert re.fullmatch("[0-9a-f]{24}", odd.headers["x-request-id"])
    drawn = server.draw(seed=1)
    name = drawn.headers["x-request-id"]  # its line may come after the answer
    (line,) = wait_for(lambda: [entry for entry in server.logged("request") if entry["request_id"] == name])
    assert (line["status"], line["model"], line["n"], line["path"]) == (200, "one-block", 1, "/v1/images/generations")
    assert line["ms"] >= line["total"] * 1e3 - 1
    assert PROMPT not in "".join(server.lines), "prompts are nobody's business"


def test_requests_at_once_share_batches_and_change_no_picture(server: Server) -> None:
    alone = [server.draw(seed=seed, num_inference_steps=12).json()["data"][0]["b64_json"] for seed in range(8)]
    batches, images = (server.metric(f"obsdiff_batch_size_{kind}", model="one-block") for kind in ("count", "sum"))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.draw(seed=seed, num_inference_steps=12), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    for answer, b64 in zip(answers, alone, strict=True):
        assert np.abs(pixels(answer.json()["data"][0]["b64_json"]) - pixels(b64)).max() <= 1
    assert server.metric("obsdiff_batch_size_sum", model="one-block") - images == 8
    assert server.metric("obsdiff_batch_size_count", model="one-block") - batches <= 5


def test_the_metrics_count_what_happened(server: Server) -> None:
    names = ("obsdiff_requests_total", "obsdiff_images_total", "obsdiff_request_seconds_count")
    before = [server.metric(name, model="plain") for name in names]
    bad = server.metric("obsdiff_errors_total", model="plain", code="invalid_size")
    server.draw(model="plain", n=3)
    server.draw(model="plain", size="8x8")
    assert [server.metric(name, model="plain") for name in names] == [before[0] + 2, before[1] + 3, before[2] + 1]
    assert server.metric("obsdiff_errors_total", model="plain", code="invalid_size") == bad + 1
    assert server.metric("obsdiff_ready") == 2
    assert server.metric("obsdiff_step_seconds_count", model="plain") >= 2
    families = {family.name: family.type for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    for name in ("queue_wait_seconds", "batch_size", "step_seconds", "request_seconds"):
        assert families[f"obsdiff_{name}"] == "histogram"
    for name in ("queue_length", "running_images", "ready"):
        assert families[f"obsdiff_{name}"] == "gauge"
    assert server.metric("obsdiff_queue_length") == server.metric("obsdiff_running_images") == 0


def test_health(server: Server) -> None:
    assert server.http.get("/health/live").json()["status"] == "live"
    assert server.http.get("/health/ready").json() == {"status": "ready", "models": {"one-block": True, "plain": True}}


def test_a_full_queue_is_429_with_a_time_to_come_back(server: Server) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: server.draw(**LONG), range(40)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 12
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        else:
            assert len(answer.json()["data"]) == 1
