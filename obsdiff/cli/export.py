"""obsdiff export"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Device, Json
from obsdiff.cli.show import ShownProgress, human, print_json, print_table


def command(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint, a diffusers folder, a hub id, or `fashion`.")],
    bundle: Annotated[Path, typer.Argument(help="Where the bundle goes.")],
    format: Annotated[
        list[str] | None,
        typer.Option(help="onnx, tensorrt, tensorrt-rtx, torch-tensorrt or aoti; repeatable. [default: onnx]"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16: what the denoiser is stored and runs in.")
    ] = "fp32",
    batch: Annotated[str, typer.Option(metavar="MIN:OPT:MAX", help="Images at once.")] = "1:1:8",
    size: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Pixels of a side. [default: half, once, 1.5 times the model's]"),
    ] = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace BUNDLE if it is a bundle.")] = False,
    json: Json = False,
) -> None:
    """Shrink a pruned model, trace it to ONNX, and prove that the graph computes the same.

    Heads and neurons that were pruned are really gone from the bundle. The graph takes any batch, size and prompt
    length in range; it is run in ONNX Runtime against PyTorch at shapes other than the traced one, and a bundle that
    disagrees is not written.

    Example: obsdiff export pruned bundle --precision fp16 --size 512:1024:1024
    """
    from obsdiff.export.stage import export

    manifest = export(
        model,
        bundle,
        formats=format or ["onnx"],
        precision=precision,  # type: ignore[arg-type]
        batch=batch,
        size=size,
        device=device,
        force=force,
        progress=ShownProgress(),
    )
    if json:
        return print_json(manifest.model_dump(mode="json"))
    dense, small = manifest.dense, manifest.totals
    print_table(
        ("denoiser", "dense", "bundle", "ratio"),
        [
            (
                "parameters",
                human(dense.parameters),
                human(small.parameters),
                f"{small.parameters / dense.parameters:.2f}",
            ),
            ("nonzero", human(dense.nonzero), human(small.nonzero), f"{small.nonzero / dense.nonzero:.2f}"),
            ("MACs a call", human(dense.macs), human(small.macs), f"{small.macs / dense.macs:.2f}"),
            ("weights", human(dense.bytes, "B"), human(small.bytes, "B"), f"{small.bytes / dense.bytes:.2f}"),
        ],
    )
    for name, check in manifest.formats.items():
        print_table(
            (f"{name} against PyTorch", ""),
            [
                ("relative error", f"{check.relative_error:.1e}"),
                ("largest difference", f"{check.max_difference:.1e}"),
            ],
        )
    return None
