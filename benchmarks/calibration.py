"""Whole prunes of the embedded model: how far the pictures move, and what that costs; all sides in one run.

Error: mean squared difference of the final latents to the dense model's for 32 prompts that no calibration used, same
seeds, over their variance. All linears (structured: all but the first and last block), 32 calibration prompts, 12
steps, guidance 4, several calibration seeds. Times are of whole prunes, only to be compared with each other. Solvers
are compared in paper_tables.py.

    python benchmarks/calibration.py [modes] [allocation] [--only REGEX] [--seeds 3]
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from obsdiff.measure import quality
from obsdiff.measure.environment import environment
from obsdiff.measure.fashion import unseen_captions
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import load

CALIBRATION: dict[str, Any] = {"num_prompts": 32, "steps": 12, "batch_size": 16, "guidance_scale": 4.0}
PROMPTS, SEEDS = unseen_captions(32), range(1000, 1032)
HALF: dict[str, Any] = {"pattern": "2:4"}
SPARSE: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.6}
UNITS: dict[str, Any] = {"pattern": "structured", "sparsity": 0.3}
STREAM: dict[str, Any] = {"calibration": "stream"}

PARTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "modes": [
        (f"{name}, {mode}", {**pattern, **options, "allocation": "uniform"})
        for name, pattern in (("2:4", HALF), ("60 %", SPARSE))
        for mode, options in (
            ("sampler, 1 package", {"packages": 1}),
            ("sampler, 4 packages", {"packages": 4}),
            ("sampler, 8 packages", {"packages": 8}),
            ("stream", STREAM),
            ("stream, a quarter of the calls", {**STREAM, "call_share": 0.25}),
            ("stream, asymmetric target", {**STREAM, "target": "asymmetric"}),
        )
    ],
    "allocation": [
        *(
            (f"60 %, auto, {allocation}", {**SPARSE, **STREAM, "allocation": allocation})
            for allocation in ("uniform", "owl", "error")
        ),
        ("structured 30 %, magnitude", {**UNITS, "solver": "magnitude", "allocation": "uniform"}),
        *(
            (f"structured 30 %, {allocation}", {**UNITS, **STREAM, "allocation": allocation})
            for allocation in ("uniform", "error")
        ),
        ("structured, --target-size 0.8", {"target_size": 0.8, **STREAM}),
        ("structured, --target-speedup 1.15", {"target_speedup": 1.15, **STREAM, "batch_size": 32}),
        ("structured 30 % uniform, then 2:4", {**UNITS, **STREAM, "pattern": "structured+2:4"}),
    ],
}


def draw(path: str | Path) -> quality.Drawn:
    pipe = load(path, device="cpu")
    options = call_options(pipe, path, {"num_inference_steps": 12, "guidance_scale": 4.0})
    return quality.draw(pipe, PROMPTS, SEEDS, options, batch_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--only", default="", help="rows whose name matches")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    reference = draw("fashion")
    for part in args.parts:
        print(f"{part}: latent error by calibration seed, mean, seconds of a prune")
        for name, options in (row for row in PARTS[part] if re.search(args.only, row[0])):
            errors, seconds, note = [], [], ""
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    info = prune("fashion", Path(folder) / "out", seed=seed, device="cpu", **{**CALIBRATION, **options})
                    seconds.append(time.perf_counter() - start)
                    errors.append(quality.latent_error(draw(Path(folder) / "out"), reference))
                if info.allocation and info.allocation.reached:
                    note += f" reached {info.allocation.reached:.3f}"
            row = " ".join(f"{error:.4f}" for error in errors)
            mean, taken = sum(errors) / len(errors), sum(seconds) / len(seconds)
            print(f"  {name:36} {row}  mean {mean:.4f}  {taken:5.1f} s{note}", flush=True)
    print(json.dumps(environment()))


if __name__ == "__main__":
    main()
