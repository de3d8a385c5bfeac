"""obsdiff serve"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Backend, Device, NoBuild


def command(
    bundles: Annotated[list[str], typer.Argument(help="Bundles, each a model by its folder's name; or NAME=PATH.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    backend: Backend = "auto",
    no_build: NoBuild = False,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once, within the bundle's range.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait; beyond it the answer is 429.")] = 64,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a batch waits for company.")] = 5,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds in which a request must be answered.")] = 120,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line: /v1/ is then open to them alone.", show_default=False)
    ] = None,
    device: Device = None,
) -> None:
    """Serve bundles over HTTP: the OpenAI images API, health, metrics and a page to play with.

    Requests that share size, steps and guidance are drawn in one batch. SIGTERM or Ctrl-C lets what was accepted
    finish; a second one ends at once. Logs are JSON on standard error; the API is described at /docs.

    Example: obsdiff serve dense-bundle pruned=bundle --port 8000
    """
    from obsdiff.errors import InputError

    try:
        from obsdiff.runtime.server.serving import run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'obsdiff[serve]'") from None

    run(
        bundles,
        host,
        port,
        backend=backend,
        build=not no_build,
        device=device,
        max_batch_size=max_batch_size,
        max_queue=max_queue,
        max_wait=max_wait / 1000,
        deadline=deadline,
        api_key_file=api_key_file,
    )
