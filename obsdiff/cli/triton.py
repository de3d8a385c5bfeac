"""obsdiff triton"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Backend, Json
from obsdiff.cli.show import ShownProgress, human, print_json, print_table


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    repo: Annotated[Path, typer.Argument(help="The model repository: a folder, made where there is none.")],
    name: Annotated[
        str | None, typer.Option(help="The model's name. [default: the bundle's folder]", show_default=False)
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Engines side by side, on each GPU that is used.")] = 1,
    backend: Backend = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda (every GPU), cuda:1 ... [default: what the server has]", show_default=False),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures at once. [default: what the bundle was exported for]", show_default=False),
    ] = None,
    denoiser: Annotated[
        bool, typer.Option("--denoiser", help="Add NAME-denoiser, the graph alone for Triton's ONNX Runtime backend.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Put the bundle into the repository instead of naming its path.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace models of these names.")] = False,
    json: Json = False,
) -> None:
    """Write a model repository for Triton Inference Server.

    The model takes a prompt and a seed (negative_prompt, steps, guidance_scale, height and width where wanted) and
    gives a picture as UINT8. Triton's Python needs obsdiff installed.

    Example: obsdiff triton bundle models --name boots && tritonserver --model-repository models
    """
    from obsdiff.runtime.triton import write_repository

    models = write_repository(
        bundle,
        repo,
        name=name,
        instances=instances,
        backend=backend,
        device=device,
        max_batch_size=max_batch_size,
        copy=copy,
        denoiser=denoiser,
        force=force,
        progress=ShownProgress(),
    )
    if json:
        return print_json({"repository": str(repo), "models": models})
    print_table(
        ("model", "backend", "pictures or inputs at once", "size"),
        [(row["folder"], row["backend"], str(row["max_batch_size"]), human(row["bytes"], "B")) for row in models],
    )
    return None
