"""Denoisers of real sizes with random weights, as they are after a prune and an export: dense, 2:4, narrower.

What a call takes does not hang on what the weights are, only on their shapes, dtype and zeros.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from real_sizes import group_records, read_source
from torch import Tensor, nn

from obsdiff import gemm_times
from obsdiff.models import graph, size_of, walk
from obsdiff.models.gemms import Gemm, find_gemms
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, find_source, load_pipeline, meta_denoiser
from obsdiff.prune.recipe import make_recipe
from obsdiff.prune.solvers import NM, solve
from obsdiff.runtime.backends import torch_sparse

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2:4": {"pattern": "2:4"},
    "structured 15 %": {"pattern": "structured", "sparsity": 0.15, "allocation": "uniform"},
    "structured 30 %": {"pattern": "structured", "sparsity": 0.3, "allocation": "uniform"},
}
WAYS = {variant: ("eager", "compiled", *(("torch-sparse",) if variant == "2:4" else ())) for variant in VARIANTS}
PIXELS_PER_LATENT = 8
INNER = "1:-1"  # the first and the last block stay dense, as the prune's own default


def build(source: Source, variant: str, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The denoiser of that variant with normal weights that keep activations' size."""
    import diffusers

    with init_empty_weights(include_buffers=False):
        module = getattr(diffusers, source.spec.denoiser).from_config(dict(source.config)).eval().requires_grad_(False)
    options = VARIANTS[variant]
    if options.get("pattern") == "structured":
        shrink(module, source.spec, group_records(module, source.spec, make_recipe(source, options)))
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if parameter.ndim > 1:
            value.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if leaf == "weight" else 0.0)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    module.to(device)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(dtype)
    if options.get("pattern") == "2:4":
        for name in prunable(module, source):
            weight = module.get_submodule(name).weight
            weight.data = solve(
                weight.float(), torch.eye(weight.shape[1], device=device), NM(2, 4), "magnitude"
            ).weight.to(dtype)
    return module


def prunable(module: nn.Module, source: Source) -> list[str]:
    """Full names of the linears that a prune takes by default."""
    stages = walk.linear_stages(module, source.spec, INNER)
    return [name for stage in stages for shared in stage.linears for name in shared]


def call_inputs(source: Source, pixels: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs of one call: `batch` pictures without guidance, usual prompt length."""
    side, patch = pixels // PIXELS_PER_LATENT, size_of(source.spec.patch, source.config)
    assert side % patch == 0
    axes = {"batch": batch, "height": side, "width": side, "tokens": source.prompt_tokens}
    return graph.random_inputs(source.spec, source.config, axes, dtype, device)


def eager(module: nn.Module, source: Source, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A call without arguments."""
    call, values = graph.TensorDenoiser(module, source.spec), list(inputs.values())

    def run() -> Tensor:
        with torch.no_grad():
            return call(*values)

    return run


def compile_blocks(module: nn.Module, source: Source) -> None:
    """torch.compile of every block: equal blocks share what is compiled, so it takes seconds and not minutes."""
    for block in walk.blocks_of(module, source.spec):
        block.module.compile(dynamic=False)


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph: what the CPU takes to start kernels is gone. On a CPU the call itself."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        result = run()

    def replay() -> Tensor:
        taken.replay()
        return result

    return replay


def prepare(
    source: Source, variant: str, way: str, inputs: Mapping[str, Tensor], device: str, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """A variant ready to be called in that way, and what is to be said of it: of torch-sparse how many layers run
    sparse, the share of the dense call that the products of 2:4 layers take (by their times alone), and its limit.
    """
    module, note = build(source, variant, device, dtype), dict[str, Any]()
    if way == "torch-sparse":
        note = make_sparse(module, source, inputs, device, dtype)
    if way == "eager":
        return eager(module, source, inputs), note
    compile_blocks(module, source)
    return captured(eager(module, source, inputs)), note


def make_sparse(
    module: nn.Module, source: Source, inputs: Mapping[str, Tensor], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Turns the linears sparse that gain, as the backend torch-sparse does."""
    wanted = set(prunable(module, source))
    found = [gemm for gemm in products(source, inputs) if gemm.name in wanted]
    kind = "fp16" if dtype == torch.float16 else "bf16"
    rows = torch_sparse.plan(graph.TensorDenoiser(module, source.spec), found, kind, device)  # type: ignore[arg-type]
    names = {gemm.scope: gemm.name for gemm in found}
    for row in rows:
        if row.sparse:
            torch_sparse.make_sparse(module.get_submodule(names[row.name]))  # type: ignore[arg-type]
    return {
        "sparse": sum(row.sparse for row in rows),
        "of": len(rows),
        "products_dense_ms": sum(row.dense_ms or 0 for row in rows),
        "products_sparse_ms": sum((row.sparse_ms if row.sparse else row.dense_ms) or 0 for row in rows),
    }


def products(source: Source, inputs: Mapping[str, Tensor]) -> list[Gemm]:
    """What a call with these inputs multiplies."""
    axes: dict[str, int] = {}
    for entry in source.spec.graph_inputs(source.config):
        axes |= {str(axis): size for axis, size in zip(entry.axes, inputs[entry.name].shape, strict=True)}
    if "height" not in axes:  # packed latents: a square has as many tokens
        patch = size_of(source.spec.patch, source.config)
        axes["height"] = axes["width"] = math.isqrt(axes["image"]) * patch
    return find_gemms(meta_denoiser(source), source.spec, source.config, axes)


def gemm_rows(kind: str, sources: Sequence[Source], pixels: Sequence[int], device: str) -> dict[str, Any]:
    """Sparse against dense at every shape that the sources' prunable layers have."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    shapes = {
        (gemm.rows, *gemm.shape)
        for source in sources
        for side in pixels
        for gemm in products(source, call_inputs(source, side, 1, dtype, "meta"))
        if gemm.name in set(prunable(meta_denoiser(source), source))
    }
    if device == "cpu":
        return {"shapes": len(shapes), "failed": "a CPU has no sparse products"}
    table = gemm_times.measure_gemms(sorted(shapes), str(dtype).removeprefix("torch."), device)  # type: ignore[arg-type]
    rows = []
    for entry in table.entries:
        row: dict[str, Any] = {
            "rows": entry.rows,
            "out": entry.shape[0],
            "in": entry.shape[1],
            "dense_ms": entry.dense_ms,
        }
        tera = 2 * entry.rows * entry.shape[0] * entry.shape[1] / entry.dense_ms / 1e9
        ratio = entry.dense_ms / entry.sparse_ms if entry.sparse_ms else None
        rows.append(row | {"sparse_ms": entry.sparse_ms, "ratio": ratio, "dense_tflops": tera})
    return {"dtype": kind, "rows": rows}


def random_pipeline(folder: Path, name: str, **changes: Any) -> Path:
    """A diffusers folder with a random denoiser of that size (one of real_sizes.NAMES of the SD3 family) around the
    embedded model's encoders and decoder: calibration takes what it takes for the real one but for encoding prompts.
    """
    from diffusers import SD3Transformer2DModel

    fashion = find_source("fashion")
    kept = ("joint_attention_dim", "pooled_projection_dim", "in_channels", "out_channels")
    config = dict(read_source(name, **changes).config) | {key: fashion.config[key] for key in kept}
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        transformer = SD3Transformer2DModel.from_config(config).to(torch.bfloat16)
    load_pipeline(fashion, torch.bfloat16, transformer=transformer).save_pretrained(folder)
    calls = {"max_sequence_length": 333 - 12, "prompt_tokens": 333}  # zeros where a third encoder's tokens would be
    (folder / "generation_config.json").write_text(json.dumps(calls))
    return folder
