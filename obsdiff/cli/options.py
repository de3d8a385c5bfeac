"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Bundle = Annotated[Path, typer.Argument(help="A bundle; a model or checkpoint folder, a hub id or `fashion` work too.")]
Backend = Annotated[
    str,
    typer.Option(
        help="What the denoiser of a bundle runs on: auto, torch, torch-sparse, onnxruntime, onnxruntime-tensorrt, "
        "tensorrt, tensorrt-rtx, torch-tensorrt or aoti. auto is what obsdiff tune recorded for this device; else the "
        "first that is ready, without building anything, of tensorrt, torch-tensorrt, onnxruntime, torch on CUDA, and "
        "of onnxruntime, torch on a CPU."
    ),
]
NoBuild = Annotated[
    bool,
    typer.Option(
        "--no-build", help="Do not build an engine that the bundle lacks for this machine, which can take minutes."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ... [default: cuda where there is one]", show_default=False),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps. [default: the model's own]")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale. [default: the model's own]")]
Side = Annotated[int | None, typer.Option(min=8, help="Pixels. [default: the model's own]")]
