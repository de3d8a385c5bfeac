"""obsdiff prune"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obsdiff.cli.options import Device, Guidance, Json, Side, Steps
from obsdiff.cli.show import ShownProgress, human, print_json, print_table

if TYPE_CHECKING:
    from obsdiff.checkpoint import CheckpointInfo


def command(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a hub id, or `fashion`.")],
    out: Annotated[Path, typer.Argument(help="Where the pruned checkpoint (a diffusers folder) goes.")],
    pattern: Annotated[
        str | None,
        typer.Option(
            help="unstructured, N:M (2:4 for sparse tensor cores), structured, or structured+N:M. "
            "[default: 2:4; structured with --target-size and --target-speedup]"
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of weights, or of heads and neurons, that goes. [default: 0.5; structured: 0.3]"),
    ] = None,
    heads: Annotated[
        float | None, typer.Option(help="structured: share of heads that goes. [default: --sparsity]")
    ] = None,
    neurons: Annotated[
        float | None, typer.Option(help="structured: share of FFN neurons that goes. [default: --sparsity]")
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(help="structured: FFN widths stay multiples of this. [default: 64, 8 below 1024]"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform (the paper), owl, or error: more where it changes the denoiser's output less. "
            "[default: error with a target, and for unstructured and structured with the solver auto]"
        ),
    ] = None,
    target_size: Annotated[
        float | None, typer.Option(help="structured: the share of the denoiser's parameters that may be left.")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(help="structured: how many times as fast the denoiser must be, measured on this device in torch."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SCALE]",
            help="Fuse this LoRA first (.safetensors, or a hub id); repeatable. Later it would fill the zeros again.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="For a MODEL that is one .safetensors file: a pipeline of the same architecture."),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(help="auto (the best of obs and alps on held-out prompts), obs, alps, dsnot, wanda or magnitude."),
    ] = "auto",
    damping: Annotated[
        float | None, typer.Option(help="obs, alps: share of H's diagonal added to it. [default: 0.01; alps: 0.1]")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Calibration prompts: text (one a line) or JSON lines. [default: ones that ship]"),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="How many of the prompts to use. [default: 100]")] = None,
    steps: Steps = None,
    height: Side = None,
    width: Side = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(help="Prompts in one calibration call.")] = 8,
    calibration: Annotated[
        str,
        typer.Option(help="sampler: one run for each package; stream: one run in all, carried block by block."),
    ] = "sampler",
    packages: Annotated[
        int | None,
        typer.Option(help="sampler: 1 run is cheapest, more see the pruning before them. [default: 4]"),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="stream: symmetric keeps a layer's outputs for the inputs it gets, asymmetric the dense ones."
        ),
    ] = "symmetric",
    token_share: Annotated[float, typer.Option(help="Share of the tokens that is calibrated on.")] = 1,
    call_share: Annotated[
        float, typer.Option(help="stream: share of the recorded denoiser calls that is calibrated on.")
    ] = 1,
    cache_gb: Annotated[float, typer.Option(help="stream: memory for activations; more goes to OUT.partial.")] = 8,
    offload: Annotated[
        bool, typer.Option("--offload", help="stream: keep the model on the CPU, one block at a time on the device.")
    ] = False,
    timestep_weighting: Annotated[
        str, typer.Option(help="log-decrease, log-increase, linear-decrease, linear-increase or uniform.")
    ] = "log-decrease",
    blocks: Annotated[
        str | None, typer.Option(help="Blocks A:B as Python slices. [default: all; structured: 1:-1]")
    ] = None,
    include: Annotated[str, typer.Option(help="Only layers whose full name matches this expression.")] = "",
    exclude: Annotated[str, typer.Option(help="Not the layers whose full name matches this expression.")] = "",
    only_faster: Annotated[
        bool,
        typer.Option(
            "--only-faster",
            help="2:4: leave layers dense whose sparse product is no faster, measured on this GPU (or --gemm-table).",
        ),
    ] = False,
    gemm_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="only-faster: times from another machine (its ~/.cache/obsdiff/gemms)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration noise.")] = 0,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What the sampler computes in. [default: float32 on cpu, bfloat16 on cuda]"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an earlier prune left in OUT.")] = False,
    json: Json = False,
) -> None:
    """Find OBS-Diff masks and compensate the weights that stay.

    Nothing changes shape: OUT loads with plain diffusers, and `obsdiff export` makes it small or fast.
    Interrupted, the same command goes on after the last finished package.

    Example: obsdiff prune fashion pruned --pattern 2:4 --num-prompts 32
    """
    options = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "out", "restart", "json") and value is not None
    }
    from obsdiff.prune.stage import prune

    info = prune(model, out, restart=restart, progress=ShownProgress(), **options)
    if json:
        return print_json(info.model_dump(mode="json"))
    errors = [layer.error for layer in info.layers if layer.error is not None]
    entries = sum(a * b for a, b in (layer.shape for layer in info.layers))
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in info.layers)
    print_table(
        ("", "value"),
        [
            ("checkpoint", str(out)),
            ("pattern, solver", f"{info.recipe['pattern']}, {info.recipe['solver']}"),
            ("pruned linears", f"{len(info.layers)} with {human(entries)} weights"),
            *([("left dense", _left(info))] if info.recipe["left_dense"] else []),
            ("zeros in them", f"{zeros / entries:.1%}"),
            *_stays(info),
            ("relative output error", f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f}"),
        ],
    )
    return None


def _left(info: "CheckpointInfo") -> str:
    left, table = info.recipe["left_dense"], info.recipe["gemm_table"]
    return f"{len(left)}: 2:4 makes them no faster on {table['device']}"


def _stays(info: "CheckpointInfo") -> list[tuple[str, str]]:
    """Rows for the units that stay and what they had to come to: zeros do not tell, since MACs are not weights."""
    rows = []
    if info.groups:
        counts = [
            f"{sum(len(group.kept) for group in groups)} of {sum(group.of for group in groups)} {kind}"
            for kind in ("heads", "neurons")
            if (groups := [group for group in info.groups if group.kind == kind])
        ]
        rows.append(("heads and neurons that stay", ", ".join(counts)))
    found = info.allocation
    if found and found.asked and found.reached:
        if info.recipe["target_speedup"]:
            rows.append(("speed-up measured in torch", f"{found.reached:.2f}× of {found.asked:.2f}× asked"))
        elif info.recipe["target_size"]:
            rows.append(("parameters that stay", f"{found.reached:.1%} of the denoiser's, {found.asked:.1%} asked"))
        else:
            rows.append(("their work that goes", f"{found.reached:.1%} of the MACs, {found.asked:.1%} asked"))
    return rows
