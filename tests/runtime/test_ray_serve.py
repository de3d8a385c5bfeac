"""The Ray Serve application: its options, and the manifest's configuration on a real local cluster.

CONTRIBUTING.md says how to get one: OBSDIFF_RAY is a virtual environment with ray[serve].
"""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

import obsdiff
from obsdiff.errors import InputError
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.ray_serve import Options, app

RAY = Path(os.environ.get("OBSDIFF_RAY", "/nowhere"))
PROJECT = Path(obsdiff.__file__).parents[1]
MANIFEST = PROJECT / "deploy" / "kubernetes" / "rayservice.yaml"
PROMPT = "a red ankle boot"
needs_ray = pytest.mark.skipif(
    not (RAY / "bin" / "serve").is_file(),
    reason="OBSDIFF_RAY names no environment with ray[serve]: see CONTRIBUTING.md",
)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"bundle": "b", "replica": 3}, {"bundle": "b", "gpus": -1}, {"bundle": "b", "max_batch_size": 0}],
    ids=str,
)
def test_options_that_are_wrong_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options.model_validate(wrong)


def test_options_come_as_the_words_of_a_command_line() -> None:
    words = "bundle=b gpus=0.5 max_batch_size=4 max_replicas=3 target=2.5 deadline=60"
    options = Options.model_validate(dict(word.split("=") for word in words.split()))
    assert (options.gpus, options.max_batch_size, options.max_replicas) == (0.5, 4, 3)
    assert (options.target, options.deadline, options.api_key_file) == (2.5, 60, None)


def test_a_path_that_is_no_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a bundle"):
        app(Options(bundle=str(tmp_path)))
    with pytest.raises(InputError, match="max_replicas 1 is less than min_replicas 2"):
        app(Options(bundle=str(tmp_path), min_replicas=2))


def ask(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"})
    try:
        data = json.dumps(body).encode() if body else None
        with urllib.request.urlopen(request, data, timeout=120) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def is_ready(port: int) -> bool:
    try:
        return ask(port, "/health/ready")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def port(graphless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A cluster of this machine that runs what the manifest says, on a CPU: where its proxy listens."""
    folder = tmp_path_factory.mktemp("ray")
    config = yaml.safe_load(yaml.safe_load(MANIFEST.read_text())["spec"]["serveConfigV2"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    own = {"bundle": str(graphless), "name": "tiny", "device": "cpu", "gpus": 0, "cpus": 0.2, "max_batch_size": 4}
    config["applications"][0]["args"] |= own
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PATH": f"{RAY / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{sysconfig.get_path('purelib')}:{PROJECT}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = folder / "log.txt"
    with log.open("w") as file:
        command = [RAY / "bin" / "serve", "run", "config.yaml"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        start = time.perf_counter()
        while not is_ready(port):
            assert process.poll() is None, log.read_text()
            assert time.perf_counter() - start < 240, log.read_text()
            time.sleep(0.2)
        print(f"the application was ready after {time.perf_counter() - start:.1f} s")
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


@pytest.mark.slow
@needs_ray
def test_the_manifests_application_draws_what_the_command_draws(port: int, graphless: Path) -> None:
    status, models = ask(port, "/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["tiny"])
    pipe = load(graphless, device="cpu")
    options = call_options(pipe, graphless, {"num_inference_steps": 2})

    def draw(seed: int) -> tuple[int, Any]:
        return ask(port, "/v1/images/generations", {"prompt": PROMPT, "seed": seed, "num_inference_steps": 2})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(draw, range(8)))
    for seed, (status, answer) in enumerate(answers):
        assert status == 200, answer
        with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
            drawn = np.asarray(image.convert("RGB")).astype(int)
        expected = np.asarray(generate(pipe, [PROMPT], [seed], options)[0])
        assert np.abs(drawn - expected).max() <= 1


@pytest.mark.slow
@needs_ray
def test_the_manifests_application_refuses_as_the_server_does(port: int) -> None:
    status, answer = ask(port, "/v1/images/generations", {"prompt": PROMPT, "size": "20x20"})
    assert (status, answer["error"]["code"]) == (400, "invalid_size")
    assert ask(port, "/v1/models/nobody")[0] == 404
    assert ask(port, "/health/live") == (200, {"status": "live", "models": {}})
