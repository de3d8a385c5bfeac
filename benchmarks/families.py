"""What was verified for every family, read off the tests, and the table of families in the README.

The tests are the truth: which families they are parametrized over is what is written down, nothing else. Run it when a
family or a test of one is added; a test says when that was forgotten.

    python benchmarks/families.py            # writes obsdiff/data/families.json and the table in README.md
    python benchmarks/families.py --table    # prints the table only
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from obsdiff.checkpoint import denoiser_weights
from obsdiff.cli.models import COLUMNS, FILE, cells, rows
from obsdiff.cli.show import human
from obsdiff.models import FAMILIES
from obsdiff.models.source import find_source

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- families: python benchmarks/families.py -->", "<!-- families end -->"


def verified() -> dict[str, dict[str, list[str]]]:
    """By family: what its tiny random pipeline went through, which real blocks did, which whole trained model did."""
    sys.path[:0] = [str(ROOT / "tests")]
    try:
        families, journeys, sizes = (
            importlib.import_module(name)
            for name in ("models.test_families", "test_journeys", "models.test_real_sizes")
        )
    finally:
        sys.path.remove(str(ROOT / "tests"))
    embedded = find_source("fashion")  # which the tests of every stage use
    size = sum(tensor.numel() for tensor in denoiser_weights(embedded.denoiser_path).values())
    matched, drawn = set(families.NAMES), parameters(journeys.test_from_a_model_to_pictures)
    return {
        spec.family: {
            "tiny": [
                *(["the spec against the architecture"] if spec.family in matched else []),
                *(["pruned, exported, compiled by TensorRT-RTX, drawn"] if spec.family in drawn else []),
            ],
            "block": [name for name, (family, *_) in sizes.BLOCKS.items() if family == spec.family],
            "whole": [f"{embedded.name}, {human(size)} parameters"] if spec is embedded.spec else [],
        }
        for spec in FAMILIES.values()
    }


def parameters(test: Any) -> set[str]:
    """What a test is parametrized with, less what is marked to be skipped or to fail."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return {value for value in mark.args[1] if isinstance(value, str)}


def table() -> str:
    """The rows of `obsdiff models` in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(readme: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(START)
    return f"{before}{START}\n\n{table()}\n{END}{rest.split(END)[1]}"


def write() -> str:
    """What families.json must hold."""
    return json.dumps(verified(), indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and write nothing")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table())
        return
    FILE.write_text(write(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
