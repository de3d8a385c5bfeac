"""Run by test_triton_server.py with the Python that has tritonclient: asks a server over HTTP and gRPC, writes answers.

python triton_client.py HTTP_PORT GRPC_PORT FOLDER: FOLDER/inputs.npz goes to the denoiser, FOLDER/answers.json and
FOLDER/answers.npz are written.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PROMPT = "a red ankle boot"
ports, folder = sys.argv[1:3], Path(sys.argv[3])
modules = dict(zip(("http", "grpc"), (tritonclient.http, tritonclient.grpc), strict=True))
clients = {
    "http": tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports[0]}", concurrency=8),
    "grpc": tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports[1]}"),
}


def infer(protocol, model, output, arrays):
    inputs = []
    for name, array in arrays.items():
        entry = modules[protocol].InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    return clients[protocol].infer(model, inputs).as_numpy(output)


def draw(protocol, prompts, seeds, **options):
    texts = {"prompt": prompts, **{name: [options.pop(name)] for name in ("negative_prompt",) if name in options}}
    arrays = {name: np.array([[text.encode()] for text in values], dtype=object) for name, values in texts.items()}
    arrays["seed"] = np.array([[seed] for seed in seeds], dtype=np.int64)
    for name, value in options.items():
        arrays[name] = np.array([[value]] * len(prompts), dtype=np.float32 if name == "guidance_scale" else np.int64)
    return infer(protocol, "boots", "image", arrays)


def refusal(protocol, **options):
    try:
        draw(protocol, [PROMPT], [0], **options)
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return None


told = {"refused": {}}
arrays = {}
denoiser_inputs = dict(np.load(folder / "inputs.npz"))
for protocol, client in clients.items():
    told[protocol] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("boots")]
    start = time.perf_counter()
    arrays[f"{protocol}.alone"] = draw(protocol, [PROMPT], [0], steps=2)
    told[f"{protocol}.seconds"] = time.perf_counter() - start
    arrays[f"{protocol}.two"] = draw(protocol, ["teal trousers", PROMPT], [5, 0], steps=2)
    arrays[f"{protocol}.options"] = draw(
        protocol, [PROMPT], [0], steps=3, guidance_scale=2.3, height=24, width=40, negative_prompt="a blue bag"
    )
    arrays[f"{protocol}.denoiser"] = infer(protocol, "boots-denoiser", "sample", denoiser_inputs)
    told["refused"][protocol] = [refusal(protocol, **{name: value}) for name, value in (("height", 20), ("steps", 0))]
told["metadata"] = clients["http"].get_model_metadata("boots")
told["config"] = clients["http"].get_model_config("boots")
with ThreadPoolExecutor(8) as pool:
    many = list(pool.map(lambda seed: draw("grpc", [PROMPT], [seed], steps=2), [0] * 4 + [1] * 4))
arrays["many"] = np.concatenate(many)
statistics = clients["http"].get_inference_statistics("boots")["model_stats"][0]
told["batches"] = [int(entry["batch_size"]) for entry in statistics["batch_stats"]]
told["pictures"] = int(statistics["inference_count"])
(folder / "answers.json").write_text(json.dumps(told))
np.savez(folder / "answers.npz", **arrays)
