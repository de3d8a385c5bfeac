"""The receipt: which products of matrices can run on sparse tensor cores, which were seen to, and what it gained.

BUNDLE/receipt.json is a Receipt. Every export writes one from the weights, and from the graph where there is one;
kernels and times are filled in from what engines told (obsdiff.export.evidence).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from obsdiff.errors import GateError, InputError, first_problem
from obsdiff.export import sparsity
from obsdiff.export.bundle import RECEIPT, Manifest
from obsdiff.export.schema import Axis, Precision
from obsdiff.files import read_json
from obsdiff.models import GroupRecord, graph
from obsdiff.models.gemms import Gemm, find_gemms
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, meta_denoiser

NO_EVIDENCE = "none: no engine that tells was built here"
HOW = "on a GPU, export --format tensorrt tells (its build log and engine inspector), and so does tune of torch-sparse"
SPEEDUP = 2  # of a product on sparse tensor cores, at most

Kernel = Literal["sparse", "dense", "unknown"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layer(_Model):
    """One linear, or convolution as a matrix.

    shape [out, in]; `rows` inputs at the profile's usual shape, all inputs of its batch together; `macs_share` of all
    of the denoiser's MACs; `nodes` of the graph that multiply with it; `reason` why it cannot run sparse, or does not.
    Milliseconds are of one call of the denoiser.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    macs_share: float
    dtype: str
    nm_valid: bool
    eligible: bool
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    kernel: Kernel = "unknown"
    dense_ms: float | None = None
    sparse_ms: float | None = None


class Summary(_Model):
    """Counts of layers; shares of one call's time: `gemm_share` in products of matrices, of the dense engine.

    `limit` is how many times as fast the call could be at best (Amdahl: the eligible layers take half their time),
    `reached` how many times as fast it was. `evidence` says where kernels and times come from.
    """

    layers: int
    valid: int
    eligible: int
    eligible_macs: float
    sparse: int | None = None
    gemm_share: float | None = None
    limit: float | None = None
    reached: float | None = None
    evidence: str = NO_EVIDENCE


class Receipt(_Model):
    schema_version: Literal[1] = 1
    layers: tuple[Layer, ...]
    summary: Summary


class Evidence(_Model):
    """What an engine or a backend told: the kernel that each layer runs on, and times of one call in milliseconds.

    `absent`: layers that none of the engine's names. `total_ms`: the whole call, dense and sparse.
    """

    source: str
    kernels: Mapping[str, Kernel] = {}
    absent: tuple[str, ...] = ()
    dense_ms: Mapping[str, float] = {}
    sparse_ms: Mapping[str, float] = {}
    total_ms: tuple[float, float] | None = None


def make_receipt(
    source: Source,
    groups: Sequence[GroupRecord],
    denoiser: nn.Module,
    axes: Mapping[str, Axis],
    precision: Precision,
    path: Path | None,
) -> Receipt:
    """The receipt of the shrunk denoiser with its weights, and of the ONNX file at `path` if there is one."""
    usual = {name: axis.opt for name, axis in axes.items()}

    def shapes() -> nn.Module:
        module = meta_denoiser(source)
        shrink(module, source.spec, groups)
        return module

    gemms = find_gemms(shapes(), source.spec, source.config, usual)
    macs = graph.count_macs(shapes(), source.spec, source.config, usual)
    return receipt_of(gemms, dict(denoiser.named_modules()), macs, precision, path)


def receipt_of(
    gemms: Iterable[Gemm], modules: Mapping[str, nn.Module], macs: int, precision: Precision, path: Path | None
) -> Receipt:
    """The receipt of those products; `modules` by name hold the weights, `macs` are all of one call's."""
    gemms = list(gemms)
    changed: dict[str, str] = {}
    nodes: dict[str, list[str]] = {}
    if path:
        for name, product in sparsity.graph_products(path, {gemm.scope: gemm.name for gemm in gemms}):
            nodes.setdefault(name, []).append(product.node)
            if why := sparsity.not_24(product.weight):
                changed.setdefault(name, f"{why} in the graph's {product.node}")
    layers = []
    for gemm in gemms:
        weight = modules[gemm.name].weight
        assert isinstance(weight, nn.Parameter)
        why = sparsity.not_24(weight) or changed.get(gemm.name, "")
        valid = not why
        if path and gemm.name not in nodes:
            why = why or "not in the graph: its output is not used, or it was merged with another"
        why = why or sparsity.misfit((weight.shape[0], weight.shape[1]), precision)
        layers.append(
            Layer(
                name=gemm.name,
                shape=gemm.shape,
                rows=gemm.rows,
                macs_share=gemm.macs / macs,
                dtype=precision,
                nm_valid=valid,
                eligible=not why,
                reason=why or None,
                nodes=tuple(nodes.get(gemm.name, ())),
            )
        )
    return Receipt(layers=tuple(layers), summary=sum_up(layers, None))


def merge(receipt: Receipt, evidence: Evidence) -> Receipt:
    """The receipt with what the evidence tells. What runs sparse was eligible, whatever the rules say."""
    layers = []
    for layer in receipt.layers:
        kernel = evidence.kernels.get(layer.name, "unknown")
        reason = layer.reason
        if kernel == "sparse":
            reason = None
        elif layer.eligible and layer.name in evidence.absent:
            reason = "fused away: no layer of the engine names it"
        elif layer.eligible and kernel == "dense":
            reason = "the dense kernel was faster"
        layers.append(
            layer.model_copy(
                update={
                    "eligible": layer.eligible or kernel == "sparse",
                    "reason": reason,
                    "kernel": kernel,
                    "dense_ms": evidence.dense_ms.get(layer.name),
                    "sparse_ms": evidence.sparse_ms.get(layer.name),
                }
            )
        )
    return Receipt(layers=tuple(layers), summary=sum_up(layers, evidence))


def sum_up(layers: Sequence[Layer], evidence: Evidence | None) -> Summary:
    """The summary of those layers, as far as the evidence goes that their kernels and times come from."""
    eligible = [layer for layer in layers if layer.eligible]
    summary = Summary(
        layers=len(layers),
        valid=sum(layer.nm_valid for layer in layers),
        eligible=len(eligible),
        eligible_macs=sum(layer.macs_share for layer in eligible),
    )
    if evidence is None:
        return summary
    known = any(layer.kernel != "unknown" for layer in layers)
    found: dict[str, object] = {
        "evidence": evidence.source,
        "sparse": sum(layer.kernel == "sparse" for layer in layers) if known else None,
    }
    if evidence.total_ms:
        dense, sparse = evidence.total_ms
        share = sum(layer.dense_ms or 0.0 for layer in eligible) / dense
        found |= {
            "gemm_share": sum(layer.dense_ms or 0.0 for layer in layers) / dense,
            "limit": 1 / (1 - share + share / SPEEDUP),
            "reached": dense / sparse,
        }
    return summary.model_copy(update=found)


def say(summary: Summary) -> str:
    """The summary in one or two sentences."""
    text = (
        f"{summary.valid} of {summary.layers} products have 2:4 weights, {summary.eligible} can run on sparse tensor "
        f"cores ({summary.eligible_macs:.0%} of the MACs)"
    )
    if summary.sparse is None:
        return f"{text}; which of them do is not known ({summary.evidence.removeprefix('none: ')})"
    text += f", {summary.sparse} were seen to ({summary.evidence})"
    if summary.reached and summary.limit:
        text += (
            f". {summary.reached:.2f}× as fast as dense, of {summary.limit:.2f}× at best: "
            f"products are {summary.gemm_share:.0%} of the time"
        )
    return text


def read_receipt(bundle: Path, manifest: Manifest) -> Receipt | None:
    """The bundle's receipt with what tuning it has told since; None in a bundle without one.

    Raises InputError when it is not what obsdiff wrote.
    """
    if RECEIPT not in manifest.files:
        return None
    told = [record.evidence for record in manifest.tuned if record.evidence]
    try:
        receipt = Receipt.model_validate(read_json(bundle / RECEIPT))
        return merge(receipt, Evidence.model_validate(told[-1])) if told else receipt
    except ValidationError as error:
        raise InputError(f"{bundle / RECEIPT} is not a receipt that obsdiff wrote: {first_problem(error)}") from None


def parse_share(text: str) -> float:
    """`90%` or `90` as 0.9. Raises InputError."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 < percent <= 100:
        raise InputError(f"--require-sparse {text}: write a share of the 2:4 layers such as 90%")
    return percent / 100


def require_sparse(receipt: Receipt, share: float) -> None:
    """Raises GateError when fewer of the 2:4 layers than that share were seen to run sparse. Not knowing is not met."""
    summary, asked = receipt.summary, f"--require-sparse {share:.0%}"
    if not summary.valid:
        raise GateError(f"{asked}: none of the {summary.layers} products has 2:4 weights: prune with --pattern 2:4")
    if summary.sparse is None:
        told = f"{summary.eligible} of the {summary.valid} 2:4 layers could"
        if not summary.eligible:
            told += f": {next(layer.reason for layer in receipt.layers if layer.nm_valid)}"
        raise GateError(
            f"{asked}: no layer was seen to run sparse ({told}), since the evidence is {summary.evidence}; {HOW}"
        )
    if summary.sparse < share * summary.valid:
        missed = [layer for layer in receipt.layers if layer.nm_valid and layer.kernel != "sparse"]
        first = max(missed, key=lambda layer: layer.macs_share)
        why = first.reason or "its kernel is not known"
        raise GateError(
            f"{asked}: {summary.sparse} of {summary.valid} 2:4 layers were seen to run sparse; the largest that was "
            f"not is {first.name} ({why})"
        )
