"""What removing 30 % of heads and neurons gains in ONNX Runtime, against what the MACs promise.

A wider random SD3 (512 wide, 4 blocks, 256 + 77 tokens) and the embedded model, dense and shrunk, called in turn in one
run. Quality does not matter here, so the wide model is cut by magnitude of its random weights.

    python benchmarks/structured_speed.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_memory import PROMPTS, make_model

from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.export.stage import export
from obsdiff.measure.environment import environment
from obsdiff.models import find_spec, graph
from obsdiff.prune.stage import prune
from obsdiff.runtime.backends import Denoise, load_backend


def call(denoise: Denoise, manifest: Manifest, config: dict[str, Any], axes: dict[str, int]) -> float:
    """Seconds of one denoiser call."""
    inputs = graph.random_inputs(find_spec(manifest.denoiser), config, axes)
    start = time.perf_counter()
    denoise(**inputs)
    return time.perf_counter() - start


def compare(name: str, bundles: list[Path], axes: dict[str, int], runs: int) -> None:
    """Prints the ratio of medians, dense over shrunk, beside the ratio of MACs at these axes."""
    from obsdiff.export.totals import count_totals
    from obsdiff.runtime.pipeline import bundle_source

    manifests = [open_bundle(bundle) for bundle in bundles]
    sources = [bundle_source(bundle, m) for bundle, m in zip(bundles, manifests, strict=True)]
    macs = [count_totals(s, m.groups, axes, 4).macs for s, m in zip(sources, manifests, strict=True)]
    denoisers = [load_backend("onnxruntime", b, m, "cpu") for b, m in zip(bundles, manifests, strict=True)]
    times: list[list[float]] = [[] for _ in bundles]
    for run in range(-3, runs):
        for k, (denoise, manifest, source) in enumerate(zip(denoisers, manifests, sources, strict=True)):
            seconds = call(denoise, manifest, dict(source.config), axes)
            if run >= 0:
                times[k].append(seconds)
    dense, small = (float(np.median(t)) for t in times)
    pairs = np.median(np.array(times[0]) / np.array(times[1]))
    promised = macs[0] / macs[1]
    print(
        f"{name}: dense {dense * 1e3:.2f} ms, shrunk {small * 1e3:.2f} ms, speed-up {pairs:.3f} (median of pairs), "
        f"the MACs promise {promised:.3f}: {pairs / promised:.0%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = make_model(folder / "wide", heads=8, layers=4, position_size=16)
        options: dict[str, Any] = {"pattern": "structured", "sparsity": 0.3, "allocation": "uniform"}
        prune(
            wide,
            folder / "wide-pruned",
            solver="magnitude",
            prompts=PROMPTS,
            steps=1,
            round_to=64,
            blocks=":",
            **options,
        )
        prune("fashion", folder / "fashion-pruned", num_prompts=16, steps=6, **options)
        pairs = {}
        for model, dense in (("wide", wide), ("fashion", "fashion")):
            pairs[model] = [folder / f"{model}-dense-bundle", folder / f"{model}-bundle"]
            size = "32:128:128" if model == "wide" else None
            export(dense, pairs[model][0], batch="1:1:32", size=size)
            export(folder / f"{model}-pruned", pairs[model][1], batch="1:1:32", size=size)
        compare("512 wide, 256 + 77 tokens", pairs["wide"], _axes(2, 32, 77), args.runs)
        for batch in (1, 32):
            compare(f"fashion, batch {batch}", pairs["fashion"], _axes(2 * batch, 8, 12), 5 * args.runs)
    print(json.dumps(environment() | {"torch_threads": str(torch.get_num_threads())}))


def _axes(batch: int, side: int, tokens: int) -> dict[str, int]:
    return {"batch": batch, "height": side, "width": side, "tokens": tokens}


if __name__ == "__main__":
    main()
