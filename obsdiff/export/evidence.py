"""What a bundle's TensorRT engine tells of its layers, said of the denoiser's linears.

Beside an engine lie `<engine>.layers.json`: {"eligible": names, "picked": names, "counts": {...}, "layers": what the
engine inspector says}, and after --profile `<engine>.profile.json`: {"device": name, "dense": [...], "sparse": [...]},
each entry one of the inspector's layers with "ms". TensorRT fuses nodes into layers and names a layer by its nodes
(`node_MatMul_12 + node_add_3`); where it makes up a name, it notes the nodes in the layer's metadata.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest
from obsdiff.export.receipt import Evidence, Kernel, Receipt
from obsdiff.export.schema import Engine
from obsdiff.files import read_json

SPARSE_TACTIC = re.compile(r"sparse|spgemm|sptensor", re.IGNORECASE)
"""As in `sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_stage3_warpsize2x2x1_sptensor16x8x32`. The
inspector's HasSparseWeights is no proof: it says what the weights are (NVIDIA/TensorRT issues 4020 and 4694)."""
PRODUCT_TACTIC = re.compile(r"gemm|conv|fprop|mma|cutlass|nvjet", re.IGNORECASE)
"""A kernel that multiplies matrices: others may note the same nodes, such as what moves a product's output."""


def files_of(engine: Engine) -> tuple[str, str]:
    """Where the bundle keeps what is told of the engine's layers, and how long they take: it may have neither."""
    return f"{engine.path}.layers.json", f"{engine.path}.profile.json"


def bundle_evidence(bundle: Path, manifest: Manifest, receipt: Receipt) -> Evidence | None:
    """What the engine tells that has most to tell: one with times before one without, then one that ran here."""
    told = [engine for engine in manifest.engines if files_of(engine)[0] in manifest.files]
    if not told:
        return None
    engine = max(reversed(told), key=lambda engine: (files_of(engine)[1] in manifest.files, engine.check is not None))
    layers, times = files_of(engine)
    source = f"TensorRT {engine.key.version} for {engine.key.target}: its build log and engine inspector"
    evidence = read_layers(_read(bundle / layers), receipt, source)
    return add_profile(evidence, _read(bundle / times), receipt) if times in manifest.files else evidence


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is not what obsdiff wrote beside an engine")
    return value


def read_layers(told: Mapping[str, Any], receipt: Receipt, source: str) -> Evidence:
    """The kernels of the receipt's layers by `<engine>.layers.json`.

    Sparse where the builder's log or the tactic's name says so. Dense where the engine names another tactic, or where
    the log says which layers are sparse, all of them are found among the nodes, and this is none of them. Otherwise
    it is not known.
    """
    owners = {node: layer.name for layer in receipt.layers for node in layer.nodes}
    inspected = [(nodes_of(layer), str(layer.get("TacticName") or "")) for layer in told.get("layers", ())]
    picked = [nodes_of({"Name": name}) for name in told.get("picked", ())]
    count = (told.get("counts") or {}).get("picked")
    complete = count is not None and count == len(picked) and all(nodes & owners.keys() for nodes in picked)
    kernels: dict[str, Kernel] = dict.fromkeys(owners.values(), "dense") if complete else {}
    for nodes, tactic in inspected:
        if PRODUCT_TACTIC.search(tactic):
            kernels |= dict.fromkeys(_owned(nodes, owners), "dense")
    for nodes in (*picked, *(nodes for nodes, tactic in inspected if SPARSE_TACTIC.search(tactic))):
        kernels |= dict.fromkeys(_owned(nodes, owners), "sparse")
    seen = {name for nodes, _ in inspected for name in _owned(nodes, owners)}
    opaque = any(not nodes & owners.keys() and _is_opaque(nodes) for nodes, _ in inspected)
    absent = (
        ()
        if opaque or not inspected
        else tuple(dict.fromkeys(name for name in owners.values() if name not in {*seen, *kernels}))
    )
    return Evidence(source=source, kernels=kernels, absent=absent)


def add_profile(evidence: Evidence, told: Mapping[str, Any], receipt: Receipt) -> Evidence:
    """The evidence with the times of `<engine>.profile.json`.

    A layer that several linears were fused into shares its time among them by their MACs; what is fused into a linear
    (its bias, an activation) counts as its own.
    """
    dense, sparse = told["dense"], told["sparse"]
    return evidence.model_copy(
        update={
            "source": f"{evidence.source}, IProfiler on {told['device']}",
            "dense_ms": _times(dense, receipt),
            "sparse_ms": _times(sparse, receipt),
            "total_ms": (sum(layer["ms"] for layer in dense), sum(layer["ms"] for layer in sparse)),
        }
    )


def _times(layers: Sequence[Mapping[str, Any]], receipt: Receipt) -> dict[str, float]:
    owners = {node: layer.name for layer in receipt.layers for node in layer.nodes}
    weight = {layer.name: layer.macs_share for layer in receipt.layers}
    times: dict[str, float] = {}
    for layer in layers:
        names = _owned(nodes_of(layer), owners)
        whole = sum(weight[name] for name in names)
        for name in names:
            times[name] = times.get(name, 0.0) + layer["ms"] * weight[name] / whole
    return times


def _owned(nodes: Iterable[str], owners: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(owners[node] for node in nodes if node in owners))


def _is_opaque(nodes: Iterable[str]) -> bool:
    """Whether the layer stands for a whole piece of the graph whose nodes it does not list."""
    return any("ForeignNode" in node for node in nodes)


def nodes_of(layer: Mapping[str, Any]) -> set[str]:
    """The graph's nodes in one of the inspector's layers: by its metadata, and by its name."""
    noted = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))
    return {*noted, *(part.strip() for part in str(layer.get("Name", "")).split(" + "))}
