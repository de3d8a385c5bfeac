"""A server's life: how it starts, whom it lets in, how it ends."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from cli import assert_sentence, call

from obsdiff.runtime.server.serving import listen, name_bundles
from server import LONG, PROMPT, Server, add_key_file, wait_for


def test_keys_let_in_and_sigterm_lets_finish(graphless: Path, tmp_path: Path) -> None:
    keys = add_key_file(tmp_path, "key-one", "key-two")
    server = Server(graphless, "--api-key-file", keys, "--max-batch-size", 2)
    try:
        assert server.http.get("/health/live").status_code == 200
        early = server.http.get("/health/ready")
        if early.status_code == 503:  # else it was quicker than we are
            assert early.json()["status"] == "starting"
        server.ready()
        for header in ({}, {"Authorization": "Bearer key-on"}, {"Authorization": "Basic key-one"}, {"x": "key-one"}):
            answer = server.http.post("/v1/images/generations", json={"prompt": PROMPT}, headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="# who may draw", max_retries=0).models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-two", max_retries=0)
        assert [model.id for model in client.models.list()] == ["graphless"]
        assert "key-one" not in "".join(server.lines)
        with ThreadPoolExecutor(6) as pool:
            body = {"extra_body": {"num_inference_steps": 150}}
            asked = [pool.submit(client.images.generate, prompt=PROMPT, **body) for _ in range(5)]
            streamed = pool.submit(lambda: list(client.images.generate(prompt=PROMPT, stream=True, **body)))
            wait_for(lambda: server.metric("obsdiff_running_images") + server.metric("obsdiff_queue_length") == 6)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.logged("draining"))
            refused = server.http.post("/v1/images/generations", json=LONG, headers={"Authorization": "Bearer key-one"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"]
            health = server.http.get("/health/ready")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            assert all(len(one.result().data) == 1 for one in asked)
            assert streamed.result()[-1].type == "image_generation.completed"
        assert server.end() == 0
        assert server.logged("stopped")
        assert all(json.loads(line) for line in server.lines), "the log is JSON to its last line"
    finally:
        server.kill()


def test_a_second_signal_ends_it_at_once(graphless: Path) -> None:
    server = Server(graphless)
    try:
        server.ready()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(server.draw, n=8, **LONG) for _ in range(8)]
            wait_for(lambda: server.metric("obsdiff_running_images") > 0)
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: server.logged("draining"))
            server.process.send_signal(signal.SIGINT)
            assert server.end() == 130
            assert {one.result().status_code for one in asked} <= {200, 429, 503}
        assert "Traceback" not in "".join(server.lines)
    finally:
        server.kill()


@pytest.mark.parametrize("damage", ["hash", "no bundle", "no file"])
def test_what_cannot_be_verified_is_not_served(graphless: Path, tmp_path: Path, damage: str) -> None:
    bundle = shutil.copytree(graphless, tmp_path / "bundle")
    if damage == "hash":
        (bundle / "vae" / "config.json").write_text("{}")
    elif damage == "no bundle":
        shutil.rmtree(bundle)
        bundle.mkdir()
    else:
        (bundle / "denoiser" / "model.safetensors").unlink()
    server = Server(graphless, f"bad={bundle}") if damage == "hash" else Server(bundle)
    try:
        assert server.process.wait(120) == 2
        server.end()
        assert server.lines[-1].startswith("error: ")
        assert str(bundle) in server.lines[-1]
        assert "Traceback" not in "".join(server.lines)
    finally:
        server.kill()


def test_what_is_wrong_with_the_command_is_said_before_anything_starts(tmp_path: Path, graphless: Path) -> None:
    empty = add_key_file(tmp_path)
    assert_sentence(call("serve", graphless, "--api-key-file", empty), 2, "holds no key")
    assert_sentence(call("serve", graphless, "--api-key-file", tmp_path / "none"), 2, "No such file")
    assert_sentence(call("serve", graphless, graphless), 2, "two models are named graphless")
    assert_sentence(call("serve", f"a/b={graphless}"), 2, "no name for a model")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert_sentence(call("serve", graphless, "--port", port), 2, f"port {port}", "in use")
    assert_sentence(call("serve", graphless, "--host", "no.such.host.invalid"), 2, "no.such.host.invalid")


def test_models_are_named_by_their_folders_or_as_one_says(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "x=y").mkdir()
    named = name_bundles([str(tmp_path / "dense"), f"pruned={tmp_path / 'dense'}", str(tmp_path / "x=y"), "fashion"])
    assert list(named) == ["dense", "pruned", "x=y", "fashion"]
    assert named["pruned"] == named["dense"] == str(tmp_path / "dense")
