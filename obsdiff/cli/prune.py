"""obsdiff prune"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Device, Guidance, Json, Side, Steps
from obsdiff.cli.show import ShownProgress, human, print_json, print_table


def command(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a hub id, or `fashion`.")],
    out: Annotated[Path, typer.Argument(help="Where the pruned checkpoint (a diffusers folder) goes.")],
    pattern: Annotated[
        str, typer.Option(help="unstructured, N:M (2:4 for sparse tensor cores), or structured.")
    ] = "2:4",
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
    solver: Annotated[str, typer.Option(help="obs, wanda or magnitude.")] = "obs",
    damping: Annotated[float, typer.Option(help="obs: share of the mean diagonal added to H.")] = 0.01,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Calibration prompts: text (one a line) or JSON lines. [default: ones that ship]"),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="How many of the prompts to use.")] = 100,
    steps: Steps = None,
    height: Side = None,
    width: Side = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(help="Prompts in one calibration call.")] = 8,
    packages: Annotated[
        int, typer.Option(help="Runs of the sampler: 1 is cheapest, more see the pruning before them.")
    ] = 4,
    timestep_weighting: Annotated[
        str, typer.Option(help="log-decrease, log-increase, linear-decrease, linear-increase or uniform.")
    ] = "log-decrease",
    blocks: Annotated[
        str | None, typer.Option(help="Blocks A:B as Python slices. [default: all; structured: 1:-1]")
    ] = None,
    include: Annotated[str, typer.Option(help="Only layers whose full name matches this expression.")] = "",
    exclude: Annotated[str, typer.Option(help="Not the layers whose full name matches this expression.")] = "",
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
            ("zeros in them", f"{zeros / entries:.1%}"),
            ("relative output error", f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f}"),
        ],
    )
    return None
