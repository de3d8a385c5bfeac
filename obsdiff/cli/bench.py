"""obsdiff bench"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Backend, Device, Guidance, Json, Side, Steps
from obsdiff.cli.show import ShownProgress, human, print_json, print_table


def command(
    paths: Annotated[list[Path], typer.Argument(help="Bundles, checkpoints, folders, hub ids or `fashion`.")],
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Side = None,
    width: Side = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each path.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs of each path that are not counted.")] = 2,
    device: Device = None,
    json: Json = False,
) -> None:
    """Time one or several pipelines side by side, run by run in turn.

    The first path is what the others are compared with. Times are per batch; memory is the peak of a fresh process.
    `--backend` is for bundles; anything else runs in torch.

    Example: obsdiff bench dense-bundle pruned-bundle --batch-size 4 --runs 20
    """
    from obsdiff.measure.latency import STAGES, bench

    progress = ShownProgress()
    result = bench(
        paths,
        backend=backend,
        batch_size=batch_size,
        runs=runs,
        warmup=warmup,
        device=device,
        progress=progress,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    backends = dict.fromkeys(row["backend"] for row in result["results"])
    if len(backends) > 1:
        progress.message(f"the speed-up mixes backends ({', '.join(backends)}): export the dense model too")
    if json:
        return print_json(result)
    first = result["results"][0]["median_ms"]
    print_table(
        (
            "path",
            "backend",
            "median",
            "p90",
            "p99",
            "speed-up",
            *(s.replace("_", " ") for s in STAGES),
            "images/s",
            "memory",
        ),
        [
            (
                row["path"],
                row["backend"],
                *(f"{row[name]:.1f} ms" for name in ("median_ms", "p90_ms", "p99_ms")),
                f"{first / row['median_ms']:.2f}×",
                *(f"{row['stages_ms'][stage]:.2f} ms" for stage in STAGES),
                f"{row['images_per_second']:.2f}",
                human(row["peak_memory_bytes"], "B"),
            )
            for row in result["results"]
        ],
    )
    return None
