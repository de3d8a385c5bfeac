"""obsdiff models"""

from obsdiff.cli.options import Json
from obsdiff.cli.show import print_json, print_table


def command(json: Json = False) -> None:
    """List the denoiser families that obsdiff knows and what each supports.

    Example: obsdiff models --json
    """
    from obsdiff.models import FAMILIES

    rows = [
        {
            "family": spec.family,
            "title": spec.title,
            "pipelines": list(spec.pipelines),
            "denoiser": spec.denoiser,
            "patterns": ["unstructured", "N:M", *(["structured"] if spec.groups else [])],
            "formats": ["onnx"],
        }
        for spec in FAMILIES.values()
    ]
    if json:
        return print_json(rows)
    columns = ("family", "denoiser", "pipelines", "patterns", "formats")
    print_table(
        columns,
        [[", ".join(v) if isinstance(v := row[name], list) else str(v) for name in columns] for row in rows],
    )
    return None
