"""obsdiff report"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Json
from obsdiff.cli.show import ShownProgress, human, print_json


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Pruned checkpoints, bundles, files of `obsdiff bench PATH... --out`, folders of `obsdiff eval "
            "--out`, in any order.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page: one HTML file that needs nothing else.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading. [default: the variants and the model]")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="At most this many prompts are shown, spread evenly.")] = 12,
    json: Json = False,
) -> None:
    """Write one page that shows what was pruned: pictures, quality, latency, errors, receipts, how to do it again.

    What has the same last component in its path is one variant: pruned/2-4, bundles/2-4 and a result that names either.
    Where two different ones share it, parent/name tells them apart. A bundle of another name goes with the checkpoint
    whose recipe it holds, a dense one with the model that it was made of. All are compared with the reference of eval,
    else with the first path of bench.

    A part that nothing was given for is left out. Files are read as they are; `obsdiff inspect` verifies them.

    Example: obsdiff report pruned bundle bench.json quality --out report.html
    """
    from obsdiff.errors import InputError

    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"--out {out}: name an HTML file, for example report.html")
    from obsdiff.measure.collect import collect
    from obsdiff.measure.report import write

    progress = ShownProgress()
    report = collect(paths, title=title, pictures=pictures, progress=progress)
    with progress.task("writing the page", 1):
        out.parent.mkdir(parents=True, exist_ok=True)
        size = write(report, out)
    names = [variant.name for variant in report.variants]
    if json:
        return print_json({"report": str(out), "bytes": size, "reference": report.reference, "variants": names})
    typer.echo(f"{', '.join(names)}: open {out} in a browser ({human(size, 'B')})")
    return None
