"""obsdiff models"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from obsdiff.cli.options import Json
from obsdiff.cli.show import print_json, print_table

FILE = Path(str(files("obsdiff") / "data" / "families.json"))  # written by benchmarks/families.py from the tests
COLUMNS = ["family", "denoiser", "pipelines", "patterns", "verified"]
SIZES = {"tiny": "tiny", "block": "one block", "whole": "whole"}


def command(json: Json = False) -> None:
    """List the denoiser families that obsdiff knows, what each supports, and at which size that was verified.

    Any other denoiser of diffusers built of Linear layers can be pruned unstructured and N:M, and exported if its
    inputs are tensors.

    Tiny: a random pipeline of the real classes. One block: as wide as the real model's, with random weights.

    Example: obsdiff models --json
    """
    if json:
        return print_json(rows())
    found = rows()
    print_table(COLUMNS, [cells(row) for row in found])
    every = [(name, ", ".join(found[0][name])) for name in ("formats", "backends")]
    print_table(("every family", ""), every)
    return None


def rows() -> list[dict[str, Any]]:
    """A row for each family."""
    from obsdiff.export.stage import FORMATS
    from obsdiff.files import read_json
    from obsdiff.models import FAMILIES
    from obsdiff.runtime.backends import BACKENDS

    verified = read_json(FILE)
    found = []
    for spec in FAMILIES.values():
        kinds = dict.fromkeys(group.kind for kind in spec.blocks for group in kind.groups)
        found.append(
            {
                "family": spec.family,
                "title": spec.title,
                "pipelines": list(spec.pipelines),
                "denoiser": spec.denoiser,
                "patterns": ["unstructured", "N:M", *([f"structured ({' and '.join(kinds)})"] if kinds else [])],
                "formats": list(FORMATS),
                "backends": list(BACKENDS),
                "verified": verified.get(spec.family, {}),
            }
        )
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, by COLUMNS."""
    sizes = [f"{SIZES[size]}: {', '.join(what)}" for size, what in row["verified"].items() if what]
    texts = {**row, "verified": "; ".join(sizes) or "nothing yet"}
    return [", ".join(value) if isinstance(value := texts[name], list) else value for name in COLUMNS]
