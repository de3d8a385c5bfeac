"""The module in PyTorch with 2:4 linears as semi-structured tensors (cuSPARSELt), compiled, in CUDA graphs.

A layer stays dense where its product is slower sparse, at the shapes that the bundle is made for: `plan` says which.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.export import sparsity
from obsdiff.export.bundle import CONFIG, Manifest
from obsdiff.export.cuda_graphs import with_graphs
from obsdiff.export.program import empty_denoiser, load_module, quiet
from obsdiff.export.receipt import Evidence
from obsdiff.export.schema import Precision
from obsdiff.files import read_json
from obsdiff.gemm_times import Dtype, GemmTable, measure_gemms
from obsdiff.models.gemms import Gemm, find_gemms
from obsdiff.runtime.backends import Denoise

NAMES: dict[Precision, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}


class Row(NamedTuple):
    """A linear: whether it runs sparse, why not where it does not, milliseconds of its product where it was timed."""

    name: str
    sparse: bool
    reason: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None


def load(bundle: Path, manifest: Manifest, device: str) -> Denoise:
    """Rebuilds the module, turns the linears sparse that gain, and compiles it on its first call.

    Raises InputError when the device is no GPU with sparse tensor cores, the bundle is in fp32, or none of its
    linears is 2:4.
    """
    if torch.device(device).type != "cuda":
        raise InputError(f"--backend torch-sparse needs a CUDA GPU, and the device is {device}: use --backend torch")
    if manifest.precision not in NAMES:
        raise InputError(
            f"--backend torch-sparse: {bundle} is in {manifest.precision}, and sparse tensor cores take 2:4 weights in "
            "fp16 and bf16: export it with --precision fp16"
        )
    module = load_module(bundle, manifest, device)
    rows = plan(module, products(bundle, manifest), manifest.precision, device)
    layers = dict(module.named_modules())
    for row in rows:
        if row.sparse:
            make_sparse(cast(nn.Linear, layers[row.name]))
    compiled = torch.compile(module)

    @torch.no_grad()
    def denoise(**inputs: Tensor) -> Tensor:
        with quiet():
            return compiled(*(inputs[entry.name] for entry in module.entries))

    return with_graphs(denoise)


def products(bundle: Path, manifest: Manifest) -> list[Gemm]:
    """What one call of the denoiser multiplies, at the usual value of every axis."""
    with torch.device("meta"):
        denoiser = empty_denoiser(bundle, manifest)
    usual = {name: axis.opt for name, axis in manifest.axes.items()}
    return find_gemms(denoiser, manifest.spec, read_json(bundle / CONFIG), usual)


def plan(
    module: nn.Module, gemms: Iterable[Gemm], precision: Precision, device: str, table: GemmTable | None = None
) -> list[Row]:
    """Which of the module's linears gain as semi-structured tensors, named as in the module; convolutions never do.

    Products are timed on the device, those of one shape once, unless a `table` has them.
    Raises InputError when no linear is 2:4 with a shape that cuSPARSELt takes, or the device has no sparse kernels.
    """
    layers = dict(module.named_modules())
    linears = [gemm for gemm in gemms if isinstance(layers[gemm.scope], nn.Linear)]
    reasons = {gemm.scope: _unfit(cast(nn.Linear, layers[gemm.scope]), precision) for gemm in linears}
    able = [gemm for gemm in linears if not reasons[gemm.scope]]
    if not able:
        told = f" ({linears[0].name}: {reasons[linears[0].scope]})" if linears else ""
        raise InputError(f"--backend torch-sparse: no linear can run sparse{told}: prune with --pattern 2:4")
    dtype = NAMES[precision]
    if table is None:
        table = measure_gemms([(gemm.rows, *gemm.shape) for gemm in able], dtype, device)
    rows = []
    for gemm in linears:
        reason, time = reasons[gemm.scope], table.find((gemm.rows, *gemm.shape), dtype)
        if reason or time is None:
            rows.append(Row(gemm.scope, False, reason or "not timed"))
        else:
            reason = "" if time.faster else "the dense kernel was faster"
            rows.append(Row(gemm.scope, time.faster, reason, time.dense_ms, time.sparse_ms))
    return rows


def _unfit(linear: nn.Linear, precision: Precision) -> str:
    out, inner = linear.weight.shape
    return sparsity.not_24(linear.weight) or sparsity.misfit((out, inner), precision)


def make_sparse(linear: nn.Linear) -> None:
    """Turns the weight into a semi-structured tensor, which is half as large and a bit."""
    weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_forward_pre_hook(contiguous)


def contiguous(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Torch views the inputs of a semi-structured weight as a matrix, which one stream of a joint attention is not."""
    return tuple(value.contiguous() for value in inputs)


def examine(bundle: Path, manifest: Manifest, device: str) -> Evidence:
    """Which layers of the bundle run sparse on this backend here, for the receipt. Raises InputError as `load` does."""
    gemms = products(bundle, manifest)
    return evidence(plan(load_module(bundle, manifest, device), gemms, manifest.precision, device), gemms)


def evidence(rows: Iterable[Row], gemms: Iterable[Gemm]) -> Evidence:
    """What the plan tells for the receipt, by the names of the denoiser's own layers."""
    names: Mapping[str, str] = {gemm.scope: gemm.name for gemm in gemms}
    rows = list(rows)
    return Evidence(
        source="torch-sparse: timings of its products",
        kernels={names[row.name]: "sparse" if row.sparse else "dense" for row in rows},
        dense_ms={names[row.name]: row.dense_ms for row in rows if row.dense_ms is not None},
        sparse_ms={names[row.name]: row.sparse_ms for row in rows if row.sparse_ms is not None},
    )
