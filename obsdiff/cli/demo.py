"""obsdiff demo"""

from pathlib import Path
from typing import Annotated

import typer

from obsdiff.cli.options import Json
from obsdiff.cli.show import ShownProgress, print_json


def command(
    out: Annotated[Path, typer.Argument(help="A folder for checkpoints, bundles and the report.")] = Path("demo"),
    json: Json = False,
) -> None:
    """Run the whole path on the embedded model, from prune to bench, and write OUT/report.html.

    About two minutes on two CPU cores; offline. Run again, it uses what is there.

    Example: obsdiff demo report
    """
    from obsdiff.demo import demo

    path = demo(out, ShownProgress())
    if json:
        return print_json({"report": str(path)})
    typer.echo(f"open {path} in a browser")
    return None
