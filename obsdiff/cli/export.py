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
    components: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What becomes a graph: denoiser (always), vae (its decoder), text_encoders. The others stay modules.",
        ),
    ] = "denoiser",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16: what the denoiser is stored and runs in.")
    ] = "fp32",
    batch: Annotated[str, typer.Option(metavar="MIN:OPT:MAX", help="Images at once.")] = "1:1:8",
    size: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Pixels of a side. [default: half, once, 1.5 times the model's]"),
    ] = None,
    device: Device = None,
    sm: Annotated[
        str | None,
        typer.Option(
            help="tensorrt-rtx: the GPUs to build for, as in 86,89 (RTX 30 and RTX 40). An engine for several is held "
            "to the least of them. [default: this machine's GPU; without one, all that it knows from 80 on, but not "
            "75, which can do fp16 only]"
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="tensorrt: where it keeps how fast each kernel was, so that the next build need not time them. "
            "[default: a file of your own cache]",
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="tensorrt, tensorrt-rtx: weights that can be replaced in the engine; slower."),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming",
            help="tensorrt, tensorrt-rtx: what does not fit the GPU's memory stays in the host's; slower.",
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="tensorrt: runs on later TensorRT of the same major version too. The engine then carries code, "
            "so take such engines from those you trust.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="tensorrt: runs on any GPU from Ampere on, not this one's kind alone; slower."
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="tensorrt: build a twin without sparse kernels too, and time both layer by layer."
        ),
    ] = False,
    require_sparse: Annotated[
        str | None,
        typer.Option(
            metavar="N%",
            help="Exit with 3 when fewer of the 2:4 layers were seen to run on sparse tensor cores. BUNDLE is written.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace BUNDLE if it is a bundle.")] = False,
    json: Json = False,
) -> None:
    """Shrink a pruned model, trace it to ONNX, and prove that the graph computes the same.

    Heads and neurons that were pruned are really gone from the bundle. The graph takes any batch, size and prompt
    length in range; it is run in ONNX Runtime against PyTorch at shapes other than the traced one, and a bundle that
    disagrees is not written.

    The receipt in the bundle says of every product of matrices whether it can run on sparse tensor cores, or why not,
    and, where a TensorRT engine is built, whether it does: `obsdiff inspect BUNDLE` shows it. With --require-sparse 90%
    that is a condition; a layer of which nothing is known does not count.

    Text encoding and decoding run as modules of PyTorch unless --components asks for their graphs too: then every
    backend but torch's runs those, in ONNX Runtime, and the bundle keeps the weights for torch's.

    Example: obsdiff export pruned bundle --precision fp16 --size 512:1024:1024
    """
    from obsdiff.export.engines import parse_options
    from obsdiff.export.receipt import parse_share
    from obsdiff.export.stage import export

    manifest = export(
        model,
        bundle,
        formats=format or ["onnx"],
        components=[name.strip() for name in components.split(",") if name.strip()],
        precision=precision,  # type: ignore[arg-type]
        batch=batch,
        size=size,
        options=parse_options(
            sm=sm,
            refit=refit,
            weight_streaming=weight_streaming,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        ),
        timing_cache=timing_cache,
        device=device,
        profile=profile,
        require_sparse=None if require_sparse is None else parse_share(require_sparse),
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
    told = {f"{engine.key.format} for {engine.key.target}": engine.check for engine in manifest.engines}
    told |= {f"graph of {name}": graph.check for name, graph in manifest.graphs.items()}
    for name, check in (manifest.formats | told).items():
        if check is None:
            print_table((f"{name}", ""), [("built, and not run here", "")])
            continue
        print_table(
            (f"{name} against PyTorch", ""),
            [
                ("relative error", f"{check.relative_error:.1e}"),
                ("largest difference", f"{check.max_difference:.1e}"),
            ],
        )
    return None
