"""obsdiff tune"""

from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.cli.options import Device, Json, NoBuild
from obsdiff.cli.show import ShownProgress, print_json, print_table


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle: the result is recorded in its manifest.")],
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images at once; repeatable. [default: what the bundle was exported for]"),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Pixels, 512 or 768x512; repeatable. [default: what the bundle was exported for]"),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="These alone; torch, which they are checked against, runs beside them."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed turns of each backend.")] = 10,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a backend that gives no answer is given up.")
    ] = 1800,
    require_sparse: Annotated[
        str | None,
        typer.Option(metavar="N%", help="Exit 3 when fewer of the 2:4 layers were seen to run sparse."),
    ] = None,
    no_build: NoBuild = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find the fastest backend of this machine for a bundle, and record it there.

    Every backend that is installed is checked against PyTorch in the bundle's precision and timed in turn with it, in
    a process of its own: one that crashes, hangs, or computes something else is reported and never taken. Engines
    that are missing are built into your cache. `--backend auto`, the default everywhere, then takes what is recorded
    for its device; each device has a record of its own.

    An engine that brings code of its own (aoti, torch-tensorrt) and came with the bundle from somebody else is left
    out unless it is named.

    Example: obsdiff tune bundle --batch 1 --batch 4 --size 1024
    """
    from obsdiff.export.receipt import parse_share
    from obsdiff.measure.tune import tune

    result = tune(
        bundle,
        batches=batch or (),
        sizes=size or (),
        backends=[name.strip() for name in backends.split(",")] if backends else (),
        build=not no_build,
        device=device,
        runs=runs,
        timeout=timeout,
        require_sparse=None if require_sparse is None else parse_share(require_sparse),
        progress=ShownProgress(),
    )
    if json:
        return print_json(result)
    print_table(
        ("backend", *map(_say_shape, result["shapes"]), "speed-up", "error", ""),
        [_cells(row, result) for row in result["backends"]],
    )
    where = result["device"]
    typer.echo(f"{result['chosen']} is recorded for {where['name']} ({where['target']})")
    return None


def _say_shape(shape: dict[str, Any]) -> str:
    """Such as `4 of 768×512`: images and pixels, where the model has a choice."""
    parts = [f"{shape['images']:g}"] if "images" in shape else []
    parts += [f"{shape['width']}×{shape['height']}"] if "height" in shape else []
    return " of ".join(parts) or "a call"


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    if row["status"] != "right":
        return [row["backend"], *("" for _ in result["shapes"]), "", "", f"{row['status']}: {row['reason']}"]
    times = [f"{time:.2f} ms" for time in row["milliseconds"]]
    taken = "fastest" if row["backend"] == result["chosen"] else ""
    error = "" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
    return [row["backend"], *times, f"{row['speedup']:.2f}×", error, taken]
