"""obsdiff inspect"""

from pathlib import Path
from typing import Annotated, Any

import typer

from obsdiff.cli.options import Json
from obsdiff.cli.show import human, print_json, print_table


def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a bundle, a diffusers folder, a hub id, or `fashion`.")],
    json: Json = False,
) -> None:
    """Show what is in a checkpoint or bundle, after verifying it.

    Per layer: shape, sparsity, which N:M pattern it really has, heads or neurons that stay, what `auto` took, relative
    output error on the calibration inputs. In total: parameters, MACs of one denoiser call (one image, the model's own
    size), bytes. Of a bundle its receipt: which products of matrices have 2:4 weights and can run on sparse tensor
    cores, or why not, which were seen to, and how long they took dense and sparse.

    Example: obsdiff inspect pruned
    """
    from obsdiff.export.inspect import inspect

    found = inspect(path)
    if json:
        return print_json(found)
    print_table(("", "value"), [(name, str(value)) for name, value in found["about"].items()])
    totals = found["totals"]
    typer.echo()
    print_table(
        ("denoiser", "dense", "here", "ratio"),
        [
            (name, human(dense, unit), human(here, unit), f"{here / dense:.3f}")
            for name, unit, (dense, here) in (
                ("parameters", "", totals["parameters"]),
                ("nonzero parameters", "", totals["nonzero"]),
                ("MACs a call", "", totals["macs"]),
                ("bytes on disk", "B", totals["bytes"]),
            )
            if dense  # MACs of a denoiser without a spec are not known
        ],
    )
    if found["layers"]:
        typer.echo()
        print_table(
            ("layer", "shape", "sparsity", "N:M", "units", "solver", "error"),
            [
                (
                    layer["name"],
                    "×".join(map(str, layer["shape"])),
                    f"{layer['sparsity']:.3f}",
                    layer["nm"] or "-",
                    layer["units"] or "-",
                    f"{c['solver']} {c['damping']:g}" if (c := layer["choice"]) else "-",
                    "-" if layer["error"] is None else f"{layer['error']:.4f}",
                )
                for layer in found["layers"]
            ],
        )
    if found.get("receipt"):
        _show_receipt(found["receipt"])
    if found.get("gemms"):
        _show_gemms(found["gemms"])
    return None


def _show_receipt(receipt: dict[str, Any]) -> None:
    typer.echo(f"\n{receipt['sentence']}.")
    print_table(
        ("product", "shape", "rows", "MACs", "2:4", "kernel", "dense ms", "sparse ms", "why not sparse"),
        [
            (
                layer["name"],
                "×".join(map(str, layer["shape"])),
                str(layer["rows"]),
                f"{layer['macs_share']:.1%}",
                "yes" if layer["nm_valid"] else "no",
                layer["kernel"],
                *("-" if layer[key] is None else f"{layer[key]:.3f}" for key in ("dense_ms", "sparse_ms")),
                layer["reason"] or "-",
            )
            for layer in receipt["layers"]
        ],
    )


def _show_gemms(table: dict[str, Any]) -> None:
    typer.echo(f"\nproducts timed on {table['device']}, torch {table['torch']}: layers that are not faster stay dense")
    print_table(
        ("out×in", "rows", "dtype", "dense ms", "sparse ms"),
        [
            (
                "×".join(map(str, entry["shape"])),
                str(entry["rows"]),
                entry["dtype"],
                f"{entry['dense_ms']:.4f}",
                "-" if entry["sparse_ms"] is None else f"{entry['sparse_ms']:.4f}",
            )
            for entry in table["entries"]
        ],
    )
