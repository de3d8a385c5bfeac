"""obsdiff bench"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.cli.options import Backend, Device, Guidance, Json, Side, Steps
from obsdiff.cli.show import ShownProgress, human, print_json, print_table

# Which options go with which kind of bench; the others go with all of them.
TIMED = {"batch_size", "runs"}
PATHS = {"backend", "height", "width", "device"}
SCENARIO = {"scenario", "bound"}
LOADED = {"model", "size", "clients", "api_key_file", "timeout", "plot"}
COUNTED = {"requests", "rate"}
ALLOWED = {"PATH": PATHS | TIMED, "--url": LOADED | COUNTED, "--scenario": PATHS | SCENARIO | COUNTED}


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
        typer.Option(help="One path as MLPerf would: single-stream (p90), offline (images/s), server (p99)."),
    ] = None,
    backend: Backend = "auto",
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
        typer.Option(min=0.001, help="With --scenario server: seconds that p99 must keep, or the exit code is 3."),
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
    json: Json = False,
) -> None:
    """Time pipelines side by side, run by run in turn, or put load on a server.

    The first path is what the others are compared with. Times are per batch; memory is the peak of a fresh process.
    `--backend` is for bundles; anything else runs in torch.

    With `--url`, each `--clients` and each `--rate` is a level of load, with as many `--requests`. Clients wait for
    their answers, so they slow down with the server; arrivals do not, and their latency counts from when they were
    due. Ctrl-C reports what was measured so far.

    Example: obsdiff bench dense-bundle pruned-bundle --batch-size 4 --runs 20

    Example: obsdiff bench --url http://localhost:8000 --clients 1 --clients 4 --rate 2 --plot load.png
    """
    _check_usage(context, paths or [], url, scenario)
    shared: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    sides: dict[str, Any] = {"height": height, "width": width}
    where: dict[str, Any] = {"backend": backend, "device": device, "warmup": warmup}
    if url:
        levels = {"clients": clients or (), "rates": rate or (), "requests": requests, "warmup": warmup}
        fields = {"model": model, "size": size, "timeout": timeout}
        return _load(url, api_key_file, plot, json, {**levels, **fields, **shared})
    if scenario:
        asked = {"requests": requests, "bound": bound}
        return _scenario((paths or [])[0], scenario, rate or [], json, {**asked, **where, **shared, **sides})
    return _paths(paths or [], json, {"batch_size": batch_size, "runs": runs, **where, **shared, **sides})


def _check_usage(context: typer.Context, paths: list[Path], url: str | None, scenario: str | None) -> None:
    """One kind of bench, and only its options. Raises InputError."""
    from obsdiff.errors import InputError

    if bool(paths) == bool(url):
        raise InputError("give paths or --url, one of the two: bundle paths are timed here, a URL is put under load")
    if url and scenario:
        raise InputError("--scenario is for a path: leave --url out, or measure it with --clients and --rate")
    if scenario and len(paths) > 1:
        raise InputError("--scenario takes one path")
    kind = "--url" if url else "--scenario" if scenario else "PATH"
    known = set().union(*ALLOWED.values())
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name in known - ALLOWED[kind]:
            homes = " or ".join(home for home, names in ALLOWED.items() if name in names)
            raise InputError(f"--{name.replace('_', '-')} goes with {homes}, not with {kind}")


def _load(url: str, api_key_file: Path | None, plot: Path | None, json: bool, options: Mapping[str, Any]) -> None:
    from obsdiff.errors import InputError

    try:
        from obsdiff.measure.load import Level, check_plot, load_test, plot_load, read_key
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'obsdiff[serve]'") from None

    if plot:
        check_plot(plot)
    key = read_key(api_key_file) if api_key_file else None
    result = load_test(url, key=key, progress=ShownProgress(), **options)
    if plot:
        plot_load(result["results"], plot)
    if json:
        print_json(result)
    else:
        print_table(
            ("load", "requests", "answered", "median", "p90", "p99", "images/s", "errors"),
            [
                (
                    Level(row["clients"], row["rate"]).words,
                    str(row["requests"]),
                    str(row["answered"]),
                    *(_ms(row[name]) for name in ("median_ms", "p90_ms", "p99_ms")),
                    f"{row['images_per_second']:.2f}",
                    ", ".join(f"{count} × {kind}" for kind, count in row["errors"].items()) or "none",
                )
                for row in result["results"]
            ],
        )
    if result["interrupted"]:
        raise KeyboardInterrupt


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} ms"


def _scenario(path: Path, name: str, rates: list[float], json: bool, options: Mapping[str, Any]) -> None:
    from obsdiff.errors import GateError, InputError
    from obsdiff.measure.scenarios import run_scenario

    if len(rates) > 1:
        raise InputError("--rate: a scenario takes one")
    result = run_scenario(path, name, rate=rates[0] if rates else None, progress=ShownProgress(), **options)
    if json:
        print_json(result)
    else:
        print_table(
            ("scenario", "backend", "batch", "median", "p90", "p99", "images/s"),
            [
                (
                    name,
                    result["backend"],
                    str(result["max_batch_size"]),
                    *(_ms(result[quantile]) for quantile in ("median_ms", "p90_ms", "p99_ms")),
                    f"{result['images_per_second']:.2f}",
                )
            ],
        )
    if result["within_bound"] is False:
        bound = result["settings"]["bound"]
        raise GateError(f"p99 is {result['p99_ms'] / 1e3:.3g} s: not within the bound of {bound:g} s")


def _paths(paths: list[Path], json: bool, options: Mapping[str, Any]) -> None:
    from obsdiff.measure.latency import STAGES, bench

    progress = ShownProgress()
    result = bench(paths, progress=progress, **options)
    backends = dict.fromkeys(row["backend"] for row in result["results"])
    if len(backends) > 1:
        progress.message(f"the speed-up mixes backends ({', '.join(backends)}): export the dense model too")
    if json:
        return print_json(result)
    first = result["results"][0]["median_ms"]
    stages = [stage.replace("_", " ") for stage in STAGES]
    print_table(
        ("path", "backend", "median", "p90", "p99", "speed-up", *stages, "images/s", "memory"),
        [
            (
                row["path"],
                row["backend"],
                *(_ms(row[name]) for name in ("median_ms", "p90_ms", "p99_ms")),
                f"{first / row['median_ms']:.2f}×",
                *(f"{row['stages_ms'][stage]:.2f} ms" for stage in STAGES),
                f"{row['images_per_second']:.2f}",
                human(row["peak_memory_bytes"], "B"),
            )
            for row in result["results"]
        ],
    )
    return None
