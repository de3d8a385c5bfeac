"""The kinds of `obsdiff bench`: each measures, writes --out, and prints its table or its JSON."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obsdiff.cli.show import ShownProgress, human, print_json, print_table

KINDS = ("bench", "scenario", "load")
FIGURES = ("median_ms", "p90_ms", "p99_ms")


def check_out(out: Path) -> None:
    """Raises InputError, before anything is measured, for a file that cannot be written or is something else."""
    import os

    from obsdiff.errors import InputError
    from obsdiff.files import read_json

    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder does not exist")
    if out.exists() and not out.is_file():
        raise InputError(f"--out {out} is a folder or a device: name a file")
    if not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"--out {out}: nothing can be written into that folder")
    if out.exists() and out.stat().st_size:
        try:
            kind = read_json(out).get("kind")
        except (InputError, AttributeError):
            kind = None
        if kind not in KINDS:
            raise InputError(f"--out {out} exists and is no result of obsdiff bench: choose another name")


def _finish(result: Mapping[str, Any], out: Path | None, json: bool, show: Callable[[], None], kept: str) -> None:
    """Writes, then prints: a disk that is full hides no number. Raises KeyboardInterrupt when Ctrl-C had ended it."""
    from obsdiff.files import write_json

    try:
        if out:
            write_json(out, result)
    finally:
        if json:
            print_json(result)
        else:
            show()
    if result["interrupted"]:
        ShownProgress().message(f"ended early: {kept}{f', kept in {out}' if out else ''}")
        raise KeyboardInterrupt


def load(
    url: str, api_key_file: Path | None, plot: Path | None, out: Path | None, json: bool, options: Mapping[str, Any]
) -> None:
    from obsdiff.errors import InputError

    try:
        from obsdiff.measure.load import Level, check_plot, load_test, plot_load, read_key
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'obsdiff[serve]'") from None

    if plot:
        check_plot(plot)
    key = read_key(api_key_file) if api_key_file else None
    result = {"kind": "load", **load_test(url, key=key, progress=ShownProgress(), **options)}
    rows = result["results"]
    if plot:
        plot_load(rows, plot)

    def show() -> None:
        print_table(
            ("load", "requests", "answered", "median", "p90", "p99", "images/s", "errors"),
            [
                (
                    Level(row["clients"], row["rate"]).words,
                    str(row["requests"]),
                    str(row["answered"]),
                    *(_ms(row[name]) for name in FIGURES),
                    f"{row['images_per_second']:.2f}",
                    ", ".join(f"{count} × {kind}" for kind, count in row["errors"].items()) or "none",
                )
                for row in rows
            ],
        )

    _finish(result, out, json, show, f"{sum(row['requests'] for row in rows)} requests")


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} ms"


def _times(ratio: float | None, interval: Sequence[float] | None = None) -> str:
    if ratio is None:
        return "none"
    return f"{ratio:.2f}×" + (
        f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval and interval[0] < interval[1] else ""
    )


def scenario(
    paths: list[Path], name: str, rates: list[float], out: Path | None, json: bool, options: Mapping[str, Any]
) -> None:
    from obsdiff.errors import GateError, InputError
    from obsdiff.measure.scenarios import run_scenario

    if len(rates) > 1:
        raise InputError("--rate: a scenario takes one")
    result = run_scenario(paths, name, rate=rates[0] if rates else None, progress=ShownProgress(), **options)
    rows = result["results"]

    def show() -> None:
        print_table(
            ("path", "backend", "batch", "rate", "median", "p90", "p99", "images/s", "ratio"),
            [
                (
                    row["path"],
                    row["backend"],
                    str(row["max_batch_size"]),
                    f"{row['rate']:.3g}/s" if row["rate"] else "none" if name == "server" else "",
                    *(_ms(row[figure]) for figure in FIGURES),
                    f"{row['images_per_second']:.2f}",
                    _times(row["ratio"]),
                )
                for row in rows
            ],
        )

    _finish(result, out, json, show, f"{sum(row['requests'] for row in rows)} pictures")
    bound = result["settings"]["bound"]
    for row in rows:
        if row["within_bound"] is False:
            where = f"{row['path']} on {row['backend']}"
            if not rates:
                raise GateError(f"{where}: no rate that was tried is within the bound of {bound:g} s")
            raise GateError(f"{where}: p99 is {row['p99_ms'] / 1e3:.3g} s: not within the bound of {bound:g} s")


def paths(paths: list[Path], out: Path | None, json: bool, options: Mapping[str, Any]) -> None:
    from obsdiff.measure.latency import STAGES, bench

    progress = ShownProgress()
    result = bench(paths, progress=progress, **options)
    rows = result["results"]
    backends = dict.fromkeys(row["backend"] for row in rows)
    if len(backends) > 1 and len(options["backend"]) == 1:
        progress.message(f"the speed-up mixes backends ({', '.join(backends)}): export the dense model too")
    stages = [stage.replace("_", " ") for stage in STAGES]

    def show() -> None:
        print_table(
            ("path", "backend", "median", "p90", "p99", "speed-up", *stages, "images/s", "memory"),
            [
                (
                    row["path"],
                    row["backend"],
                    *(_ms(row[name]) for name in FIGURES),
                    _times(row["ratio"], row["ratio_interval"]),
                    *(f"{row['stages_ms'][stage]:.2f} ms" for stage in STAGES),
                    f"{row['images_per_second']:.2f}",
                    human(row["peak_memory_bytes"], "B"),
                )
                for row in rows
            ],
        )

    done = min(len(row["runs_ms"]) for row in rows)
    _finish(result, out, json, show, f"{done} of {result['settings']['runs']} runs of each")


def compare(a: Path, b: Path, json: bool) -> None:
    from obsdiff.measure import compare as measure

    result = measure.compare(a, b)
    progress = ShownProgress()
    for difference in result["differences"]:
        progress.message(f"warning: {difference}")
    for side, names in ((a, result["only_a"]), (b, result["only_b"])):
        if names:
            progress.message(f"only in {side}: {', '.join(names)}")
    if json:
        return print_json(result)
    print_table(
        ("path", "backend", "median A", "median B", "B is", "p90 A", "p90 B", "memory A", "memory B"),
        [
            (
                row["path"],
                row["backend"],
                *map(_ms, row["median_ms"]),
                f"{_times(row['ratio'], row['ratio_interval'])} as fast",
                *map(_ms, row["p90_ms"]),
                *("none" if size is None else human(size, "B") for size in row["peak_memory_bytes"]),
            )
            for row in result["rows"]
        ],
    )
    return None
