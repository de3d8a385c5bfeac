"""obsdiff bench"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.cli import bench_kinds as kinds
from obsdiff.cli.options import Device, Guidance, Json, NoBuild, Side, Steps

# Which options go with which kind of bench; --json goes with all of them.
TIMED = {"batch_size", "runs"}
DRAWN = {"steps", "guidance_scale", "warmup", "out"}
PATHS = {"backend", "no_build", "height", "width", "device"}
SCENARIO = {"scenario", "bound"}
LOADED = {"model", "size", "clients", "api_key_file", "timeout", "plot"}
COUNTED = {"requests", "rate"}
ALLOWED = {
    "PATH": DRAWN | PATHS | TIMED,
    "--url": DRAWN | LOADED | COUNTED,
    "--scenario": DRAWN | PATHS | SCENARIO | COUNTED,
    "--compare": {"compare"},
}


def command(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles, checkpoints, folders, hub ids or `fashion`.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="In the place of paths: a server with OpenAI's images API, such as obsdiff serve."),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help="Paths as MLPerf would: single-stream (p90), offline (images/s), server (p99)."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="What the denoiser of a bundle runs on, as in obsdiff run; repeatable. [default: auto]"),
    ] = None,
    no_build: NoBuild = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Side = None,
    width: Side = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each path.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs, or requests, that are not counted.")] = 2,
    requests: Annotated[int, typer.Option(min=1, help="Pictures asked for: of a URL at each level of load.")] = 50,
    clients: Annotated[
        list[int] | None,
        typer.Option(min=1, help="With --url: clients that each ask again once answered; repeatable. [default: 1]"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Poisson arrivals a second, answered or not; repeatable with --url."),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --scenario server: seconds that p99 must keep, or the exit code is 3. Without --rate, "
            "the highest rate that keeps it is searched.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --url: the model to ask for. [default: the server's]")] = None,
    size: Annotated[str | None, typer.Option(help="With --url: WIDTHxHEIGHT. [default: the server's]")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="With --url: seconds to wait for an answer.")] = 120,
    api_key_file: Annotated[
        Path | None, typer.Option(help="With --url: a file whose first line is the API key.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --url: latency against throughput, as x.png, .svg or .pdf.", show_default=False),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Write everything that was measured to this JSON file.", show_default=False)
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="In the place of paths: two files of --out, A and B; how fast B is beside A."),
    ] = None,
    json: Json = False,
) -> None:
    """Time pipelines side by side, run by run in turn, or put load on a server.

    The first row is what the others are compared with: each run with the one beside it, and the range that the
    speed-up lies in with 95 % confidence. Times are per batch; memory is the peak of a fresh process.
    With several `--backend`, every path runs on each that it can run on; what is no bundle runs in torch.
    Warnings tell when other processes, heat or drifting clocks make the numbers doubtful.

    With `--url`, each `--clients` and each `--rate` is a level of load, with as many `--requests`. Clients wait for
    their answers, so they slow down with the server; arrivals do not, and their latency counts from when they were
    due. Ctrl-C reports, and writes to `--out`, what was measured so far; the exit code is then 130.

    Example: obsdiff bench dense-bundle pruned-bundle --batch-size 4 --runs 20

    Example: obsdiff bench dense-bundle pruned-bundle --backend onnxruntime --backend torch --out today.json

    Example: obsdiff bench --compare yesterday.json today.json

    Example: obsdiff bench --url http://localhost:8000 --clients 1 --clients 4 --rate 2 --plot load.png
    """
    _check_usage(context, paths or [], url, scenario, compare)
    if compare:
        return kinds.compare(*compare, json)
    if out:
        kinds.check_out(out)
    shared: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    sides: dict[str, Any] = {"height": height, "width": width}
    where: dict[str, Any] = {"backend": backend or ["auto"], "device": device, "warmup": warmup, "build": not no_build}
    if url:
        levels = {"clients": clients or (), "rates": rate or (), "requests": requests, "warmup": warmup}
        fields = {"model": model, "size": size, "timeout": timeout}
        return kinds.load(url, api_key_file, plot, out, json, {**levels, **fields, **shared})
    if scenario:
        asked = {"requests": requests, "bound": bound}
        return kinds.scenario(paths or [], scenario, rate or [], out, json, {**asked, **where, **shared, **sides})
    return kinds.paths(paths or [], out, json, {"batch_size": batch_size, "runs": runs, **where, **shared, **sides})


def _check_usage(
    context: typer.Context, paths: list[Path], url: str | None, scenario: str | None, compare: Sequence[Path] | None
) -> None:
    """One kind of bench, and only its options. Raises InputError."""
    from obsdiff.errors import InputError

    if bool(paths) + bool(url) + bool(compare) != 1:
        raise InputError(
            "give paths or --url or --compare, one of them: paths are timed here, a URL is put under load, "
            "files that were written with --out are compared"
        )
    if url and scenario:
        raise InputError("--scenario is for a path: leave --url out, or measure it with --clients and --rate")
    kind = "--compare" if compare else "--url" if url else "--scenario" if scenario else "PATH"
    known = set().union(*ALLOWED.values())
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name in known - ALLOWED[kind]:
            homes = " or ".join(home for home, names in ALLOWED.items() if name in names)
            raise InputError(f"--{name.replace('_', '-')} goes with {homes}, not with {kind}")
