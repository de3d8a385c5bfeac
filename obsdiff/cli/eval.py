"""obsdiff eval"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.cli.options import Backend, Device, Guidance, Json, Side, Steps
from obsdiff.cli.show import ShownProgress, print_json, print_table


def command(
    paths: Annotated[
        list[Path], typer.Argument(help="Bundles, checkpoints, folders, hub ids or `fashion`.", show_default=False)
    ],
    reference: Annotated[
        Path, typer.Option(help="What they are compared with: the dense model or its bundle.", show_default=False)
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with a prompt a line, or .jsonl. [default: built in]", show_default=False),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures a path; prompts repeat with other seeds. [default: one a prompt; 64 or 128 of our own]",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Names, with commas; repeatable. [default: all that fit the model]", show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="METRIC=PATH, a metric's weights: a file or folder; repeatable.", show_default=False),
    ] = None,
    min: Annotated[
        list[str] | None,
        typer.Option(help="METRIC=VALUE: every path must reach it, or the exit code is 3; repeatable."),
    ] = None,
    max: Annotated[
        list[str] | None,
        typer.Option(help="METRIC=VALUE: no path may exceed it, or the exit code is 3; repeatable."),
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Side = None,
    width: Side = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next ones count on.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at once. [default: 8, or what a bundle allows]")
    ] = None,
    backend: Backend = "auto",
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for eval.json and pictures; obsdiff report reads it.")
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="Pictures of each path that are written to --out.")] = 16,
    json: Json = False,
) -> None:
    """Measure quality: the same prompts and the same noise on every path and on the reference.

    Each figure has its 95 % interval, by bootstrap over the pictures. Paired metrics: latent_mse, latent_error
    (over the variance; 0 is the same picture), psnr, ssim, lpips. Of the embedded model: item_accuracy,
    colour_accuracy, the same as held_out_... on pairs that it never learned, frechet_distance. Of others: fid, kid
    (against the reference's pictures), clip_score, image_reward, hpsv2. A metric whose library or weights are not
    here is named with where to get them, and the others go on; nothing is downloaded.

    Steps, guidance and size are the reference's unless given. Interrupted, the same command goes on after the paths
    that were drawn, if it has an `--out`.

    Example: obsdiff eval pruned bundle --reference MODEL --min ssim=0.8 --max latent_error=0.05 --out quality
    """
    from obsdiff.errors import GateError
    from obsdiff.measure.evaluate import evaluate

    progress = ShownProgress()
    result = evaluate(
        paths,
        reference,
        prompts=prompts,
        num_images=num_images,
        metrics=[name.strip() for entry in metrics or [] for name in entry.split(",") if name.strip()],
        weights=dict(_split("--weights", entry) for entry in weights or []),
        minimum=_limits("--min", min or []),
        maximum=_limits("--max", max or []),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        seed=seed,
        batch_size=batch_size,
        backend=backend,
        device=device,
        out=out,
        keep=keep,
        progress=progress,
    )
    if json:
        print_json(result)
    else:
        _print(result)
        for name, reason in result["skipped"].items():
            progress.message(f"skipped {name}: {reason}")
    if unmet := [_say(gate) for gate in result["gates"] if not gate["met"]]:
        raise GateError("; ".join(unmet))


def _split(option: str, entry: str) -> tuple[str, str]:
    from obsdiff.errors import InputError

    name, equals, value = entry.partition("=")
    if not equals or not name or not value:
        raise InputError(f"{option} {entry}: write it as METRIC={'PATH' if option == '--weights' else 'VALUE'}")
    return name, value


def _limits(option: str, entries: Sequence[str]) -> dict[str, float]:
    from obsdiff.errors import InputError

    limits: dict[str, float] = {}
    for entry in entries:
        name, value = _split(option, entry)
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"{option} {entry}: {value} is no number") from None
        if name in limits:
            raise InputError(f"{option}: {name} is given twice")
        limits[name] = number
    return limits


def _say(gate: Mapping[str, Any]) -> str:
    """An unmet gate in a sentence."""
    which = f"{gate['path']}: {gate['metric']}"
    if gate["value"] is None:
        return f"{which} could not be computed, so the gate of {gate['limit']:g} is not met"
    word = "below the least" if gate["bound"] == "min" else "above the most"
    return f"{which} is {gate['value']:.4g}, {word} allowed, {gate['limit']:g}"


def _print(result: Mapping[str, Any]) -> None:
    """One row a metric, one column a path, the reference first."""
    columns = [result["reference"], *result["results"]]
    names = dict.fromkeys(name for entry in reversed(columns) for name in entry["metrics"])
    rows = []
    for name in names:
        figures = [entry["metrics"].get(name) for entry in columns]
        (some, *_) = [figure for figure in figures if figure]
        rows.append((name, some["better"], str(some["images"]), *map(_cell, figures)))
    settings = result["settings"]
    title = (
        f"{len(settings['prompts'])} images a path, {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']}, {settings['width']}×{settings['height']}; 95 % intervals"
    )
    heads = [f"{result['reference']['name']} (reference)", *(entry["name"] for entry in result["results"])]
    print_table(("metric", "better", "images", *heads), rows, title)


def _cell(figure: Mapping[str, Any] | None) -> str:
    """0.912 (0.88 to 0.94)"""
    if figure is None:
        return ""
    if figure["value"] is None:
        return "none"
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.3g}"
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"
