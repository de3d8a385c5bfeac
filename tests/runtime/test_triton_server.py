"""What obsdiff triton writes, served by a real Triton and asked by tritonclient. CONTRIBUTING.md says how to get both.

OBSDIFF_TRITON is a virtual environment with nvidia-pytriton: the server, the Python backend for each version of Python,
tritonclient, and the numpy that this Triton can take. The backend runs in an environment that puts this numpy before
the packages that run the tests.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import obsdiff
from obsdiff.export.bundle import GRAPH, read_manifest
from obsdiff.runtime.generate import call_options, generate
from obsdiff.runtime.pipeline import load
from obsdiff.runtime.triton import write_repository

PROMPT = "a red ankle boot"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TRITON = Path(os.environ.get("OBSDIFF_TRITON", "/nowhere"))
PACKAGES = TRITON / "lib" / f"python{PYTHON}" / "site-packages"
FILES = PACKAGES / "pytriton" / "tritonserver"
STUB = FILES / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not STUB.is_file(), reason="OBSDIFF_TRITON names no environment with nvidia-pytriton: see CONTRIBUTING.md"
    ),
]
# This Triton has the Python backend alone: it stands in for ONNX Runtime's, and takes what the config lets through.
GRAPH_MODEL = """
import json, pathlib
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        path = pathlib.Path(args["model_repository"]) / "1" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            values = {entry.name: triton.get_input_tensor_by_name(request, entry.name).as_numpy()
                      for entry in self.session.get_inputs()}
            output, = self.session.run(None, values)
            answers.append(triton.InferenceResponse([triton.Tensor("sample", output)]))
        return answers
"""


@dataclass(frozen=True)
class Server:
    """A server that is ready: where it listens, and what tritonclient was told by it."""

    http: int
    told: dict[str, Any]
    arrays: dict[str, np.ndarray]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


def make_python(folder: Path) -> Path:
    """An environment with this one's packages, and before them the numpy of TRITON."""
    venv.create(folder)
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    for path in PACKAGES.glob("numpy*"):
        (packages / path.name).symlink_to(path)
    mine, project = sysconfig.get_path("purelib"), Path(obsdiff.__file__).parents[1]
    (packages / "more.pth").write_text(f"{mine}\n{project}\n")
    return folder


def make_backends(folder: Path) -> Path:
    shutil.copytree(FILES / "backends" / "python", folder / "python")
    shutil.copy(STUB, folder / "python")
    return folder


@pytest.fixture(scope="module")
def repository(one_block_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("triton") / "repo"
    write_repository(one_block_bundle, repo, name="boots", device="cpu", max_batch_size=4, denoiser=True)
    config = repo / "boots-denoiser" / "config.pbtxt"
    text = config.read_text().replace('"onnxruntime"', '"python"').replace("KIND_AUTO", "KIND_CPU")
    config.write_text(text)
    (repo / "boots-denoiser" / "1" / "model.py").write_text(GRAPH_MODEL)
    return repo


@pytest.fixture(scope="module")
def denoiser_inputs(one_block_bundle: Path) -> dict[str, np.ndarray]:
    sizes: dict[str | int, int] = {"batch": 3, "height": 6, "width": 4, "tokens": 5}
    drawn = np.random.default_rng(0)
    return {
        entry.name: drawn.random([sizes.get(axis, axis) for axis in entry.axes]).astype(entry.dtype)  # type: ignore[misc]
        for entry in read_manifest(one_block_bundle).inputs
    }


@pytest.fixture(scope="module")
def server(
    repository: Path, denoiser_inputs: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    http, grpc = free_ports(2)
    library = [sysconfig.get_config_var("LIBDIR"), str(PACKAGES / "nvidia_pytriton.libs")]
    environment = {
        **os.environ,
        "PATH": f"{make_python(folder / 'python')}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(library),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        FILES / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={make_backends(folder / 'backends')}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
        "--exit-timeout-secs=5",
    ]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        start = time.perf_counter()
        while not is_ready(http):
            assert process.poll() is None, log.read_text()
            assert time.perf_counter() - start < 240, log.read_text()
            time.sleep(0.1)
        print(f"tritonserver was ready after {time.perf_counter() - start:.1f} s")
        # Triton knows no input without a dimension beside the batch: it takes [batch, 1] and hands on [batch].
        sent = {name: value[:, None] if value.ndim == 1 else value for name, value in denoiser_inputs.items()}
        np.savez(folder / "inputs.npz", **sent)
        client = [TRITON / "bin" / "python", Path(__file__).with_name("triton_client.py"), str(http), str(grpc), folder]
        done = subprocess.run(client, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{done.stderr}\n{log.read_text()}"
        told = json.loads((folder / "answers.json").read_text())
        print({name: value for name, value in told.items() if name.endswith("seconds")})
        yield Server(http, told, dict(np.load(folder / "answers.npz")))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_ready(port: int) -> bool:
    try:
        return get(port, "/v2/health/ready")[0] == 200
    except OSError:
        return False


def get(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a plain HTTP request, as any client of the KServe v2 protocol makes it."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=60) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    return status, json.loads(text) if text else None


@pytest.fixture(scope="module")
def expected(one_block_bundle: Path) -> Any:
    """Draws as `obsdiff run` does: uint8 [h, w, 3]."""
    pipe = load(one_block_bundle, device="cpu")

    def draw(prompt: str, seed: int = 0, **overrides: Any) -> np.ndarray:
        options = call_options(pipe, one_block_bundle, {"num_inference_steps": 2, **overrides})
        return np.asarray(generate(pipe, [prompt], [seed], options)[0])

    return draw


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """Within a level of 8 bits, what a batch may change."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other).max() <= 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_pictures_are_what_the_command_draws(server: Server, expected: Any, protocol: str) -> None:
    assert server.told[protocol] == [True, True, True]
    alone, two = server.arrays[f"{protocol}.alone"], server.arrays[f"{protocol}.two"]
    assert (alone.shape, alone.dtype) == ((1, 32, 32, 3), np.uint8)
    assert_same(alone[0], expected(PROMPT))
    assert two.shape == (2, 32, 32, 3)
    assert_same(two[0], expected("teal trousers", 5))
    assert_same(two[1], expected(PROMPT))
    options = {"num_inference_steps": 3, "guidance_scale": 2.3, "height": 24, "width": 40}
    assert_same(server.arrays[f"{protocol}.options"][0], expected(PROMPT, negative_prompt="a blue bag", **options))


def test_clients_at_once_share_batches(server: Server, expected: Any) -> None:
    assert max(server.told["batches"]) > 2, "the largest batch of one request alone is 2"
    assert server.told["pictures"] == 2 * (1 + 2 + 1 + 2) + 8, "those that were refused count too"
    for k, picture in enumerate(server.arrays["many"]):
        assert_same(picture, expected(PROMPT, k // 4))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_denoisers_config_lets_its_inputs_through(
    server: Server, one_block_bundle: Path, denoiser_inputs: dict[str, np.ndarray], protocol: str
) -> None:
    session = onnxruntime.InferenceSession(str(one_block_bundle / GRAPH), providers=["CPUExecutionProvider"])
    (local,) = session.run(None, denoiser_inputs)
    np.testing.assert_allclose(server.arrays[f"{protocol}.denoiser"], local, rtol=1e-5, atol=1e-6)


def test_errors_carry_our_sentence(server: Server) -> None:
    for answers in server.told["refused"].values():
        (_, size), (_, steps) = answers
        assert "height 20 is outside what the bundle was exported for: 16 to 48 pixels in steps of 8" in size
        assert "steps 0 is out of range" in steps
    assert [status for status, _ in server.told["refused"]["grpc"]] == ["StatusCode.INVALID_ARGUMENT"] * 2


def test_metadata_and_config_are_what_was_written(server: Server) -> None:
    inputs = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in server.told["metadata"]["inputs"]}
    assert inputs["prompt"] == ("BYTES", [-1, 1])
    assert inputs["seed"] == ("INT64", [-1, 1])
    assert inputs["guidance_scale"] == ("FP32", [-1, 1])
    assert server.told["metadata"]["outputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    config = server.told["config"]
    assert config["max_batch_size"] == 4
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 128


def row(name: str, kind: str, value: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1, 1], "datatype": kind, "data": [value]}


def test_the_kserve_protocol_in_plain_json(server: Server, expected: Any) -> None:
    path = "/v2/models/boots"
    assert get(server.http, "/v2/health/live")[0] == 200
    assert get(server.http, f"{path}/ready")[0] == 200
    status, answer = get(
        server.http,
        f"{path}/infer",
        {"inputs": [row("prompt", "BYTES", PROMPT), row("seed", "INT64", 3), row("steps", "INT64", 2)]},
    )
    assert status == 200, answer
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("image", "UINT8", [1, 32, 32, 3])
    assert_same(np.array(output["data"], np.uint8).reshape(32, 32, 3), expected(PROMPT, 3))
    status, answer = get(
        server.http,
        f"{path}/infer",
        {"inputs": [row("prompt", "BYTES", PROMPT), row("seed", "INT64", 0), row("width", "INT64", -8)]},
    )
    assert (status, answer) == (400, {"error": "width -8 is out of range: it must lie between 1 and 99999"})
    assert get(server.http, f"{path}/infer", {"inputs": [row("prompt", "BYTES", PROMPT)]})[0] == 400
    assert get(server.http, "/v2/models/nobody")[0] >= 400
