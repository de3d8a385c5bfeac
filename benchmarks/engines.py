"""Engines that this machine can run: aoti for every family's tiny model, and all backends on the embedded one.

    python benchmarks/engines.py [families] [tune] [--only FAMILY]

families: builds an aoti engine from each tiny random pipeline of the tests; seconds, size, error against PyTorch.
tune: what `obsdiff tune` finds on the embedded model at batch 1 and 8, each backend in turn with PyTorch's eager mode.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from obsdiff.errors import ObsdiffError
from obsdiff.export.stage import export
from obsdiff.measure.environment import environment
from obsdiff.measure.tune import tune
from obsdiff.models import FAMILIES

TESTS = Path(__file__).parents[1] / "tests"


def families(folder: Path, only: str) -> None:
    """A line for each family that has a tiny pipeline of its own; SD3's is the embedded model."""
    sys.path.insert(0, str(TESTS))
    tiny = importlib.import_module("tiny")

    print("aoti, fp32: seconds to build, MB without weights, relative error at shapes that it was not traced at")
    for name in ["sd3", *sorted({spec.family for spec in FAMILIES.values()} - {"sd3"}), "generic"]:
        if only and name != only:
            continue
        model = "fashion" if name == "sd3" else tiny.make(name, folder / name)
        try:
            engine = export(model, folder / f"{name}-bundle", formats=("aoti",), device="cpu").engines[0]
        except ObsdiffError as error:
            print(f"  {name}: {error}", flush=True)
            continue
        size = os.path.getsize(folder / f"{name}-bundle" / engine.path) / 1e6
        assert engine.check
        print(f"  {name}: {engine.seconds:.0f} s, {size:.1f} MB, {engine.check.relative_error:.1e}", flush=True)


def backends(folder: Path, runs: int) -> None:
    """The table of `obsdiff tune`."""
    export("fashion", folder / "fashion", formats=("onnx", "aoti"), device="cpu")
    found = tune(folder / "fashion", batches=(1, 8), device="cpu", runs=runs)
    print(f"a denoiser call of the embedded model, {runs} runs: milliseconds and times as fast as torch")
    for row in found["backends"]:
        if row["status"] == "right":
            cells = zip(found["shapes"], row["milliseconds"], row["speedups"], strict=True)
            text = ", ".join(f"batch {shape['images']:g} {ms:.2f} ms {ratio:.2f} ×" for shape, ms, ratio in cells)
            print(f"  {row['backend']}: {text}, error {row['relative_error'] or 0:.0e}", flush=True)
    print(f"  chosen: {found['chosen']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["tune", "families"])
    parser.add_argument("--only", default="", help="families: this one alone")
    parser.add_argument("--runs", type=int, default=30, help="tune: timed turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for part in args.parts:
            if part == "tune":
                backends(Path(name), args.runs)
            else:
                families(Path(name), args.only)
    print(json.dumps(environment()))


if __name__ == "__main__":
    main()
