"""obsdiff run"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Backend, Bundle, Device, Guidance, Json, NoBuild, Side, Steps
from obsdiff.cli.show import ShownProgress, print_json


def command(
    bundle: Bundle,
    prompt: Annotated[list[str], typer.Argument(help="One or several prompts.")],
    out: Annotated[
        Path,
        typer.Option(help="x.png is a file (several pictures: x-0.png, x-1.png), any other name a folder."),
    ] = Path("images"),
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count on.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Side = None,
    width: Side = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    backend: Backend = "auto",
    no_build: NoBuild = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Draw pictures with a bundle.

    Each PNG carries its prompt, seed, options and what drew it as text chunks. A file that is there is replaced.

    Example: obsdiff run bundle "a red ankle boot" "teal trousers" --out wardrobe.png --seed 7
    """
    import time

    from obsdiff.runtime.generate import call_options, generate, identity, output_paths, save_png
    from obsdiff.runtime.pipeline import check_sides, load

    progress = ShownProgress()
    overrides = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
    }
    paths = output_paths(out, len(prompt))
    check_sides(bundle, overrides)
    with progress.task("loading", 1 + len(prompt)):
        pipe = load(bundle, backend, device, build=not no_build, progress=progress)
        options = call_options(pipe, bundle, overrides)
        who = identity(bundle)
        pictures = []
        for k, (text, path) in enumerate(zip(prompt, paths, strict=True)):
            progress.advance(1, f"drawing {text}")
            start = time.perf_counter()
            (image,) = generate(pipe, [text], [seed + k], options)
            seconds = round(time.perf_counter() - start, 4)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, {"prompt": text, "seed": seed + k, "model": who, **options})
            pictures.append({"file": str(path), "prompt": text, "seed": seed + k, "seconds": seconds})
    if json:
        return print_json({"model": who, "options": options, "images": pictures})
    for picture in pictures:
        typer.echo(picture["file"])
    return None
