"""Peak memory of a prune: one package against eight, on a random SD3 wide enough for Hessians to matter.

Each prune runs in a fresh process, on the CPU; the peak is resident memory, less that of a process that only loads
the model and draws one calibration batch. The Hessians of a package should be nearly all of the rest.

    python benchmarks/prune_memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from obsdiff.measure.environment import environment

PROMPTS = ["a red ankle boot", "teal trousers"]
CALL: dict[str, Any] = {"steps": 2, "height": 32, "width": 32, "prompts": PROMPTS, "batch_size": 2, "device": "cpu"}


def make_model(folder: Path, heads: int, layers: int, position_size: int = 8) -> Path:
    """A random SD3 pipeline around the embedded model's encoders and decoder, `heads` heads of 64 wide."""
    import torch
    from diffusers import SD3Transformer2DModel

    from obsdiff.models.source import find_source, load_pipeline

    torch.manual_seed(0)
    source = find_source("fashion")
    config = {**source.config, "attention_head_dim": 64, "num_attention_heads": heads, "num_layers": layers}
    config |= {"caption_projection_dim": 64 * heads, "pos_embed_max_size": position_size}
    transformer = SD3Transformer2DModel.from_config(config)
    load_pipeline(source, torch.float32, transformer=transformer).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(dict(source.defaults)))
    return folder


def predicted(model: Path, packages: int) -> dict[str, float]:
    """The bytes that a prune says it will need, by what they are for."""
    from obsdiff.models import walk
    from obsdiff.models.source import find_source, meta_denoiser
    from obsdiff.prune import memory
    from obsdiff.prune.packages import cut
    from obsdiff.prune.recipe import make_recipe

    source = find_source(model)
    denoiser = meta_denoiser(source)
    stages = cut(walk.linear_stages(denoiser, source.spec), packages)
    return memory.predict(denoiser, source.spec, stages, make_recipe(source, CALL), 2 * len(PROMPTS) * (16 + 12))


def child(model: str, packages: int, out: str) -> None:
    """Prunes in this process, or only draws for 0 packages, and prints the peak in bytes."""
    import torch

    from obsdiff.prune.stage import prune

    if packages:
        prune(model, out, pattern="2:4", packages=packages, **CALL)
    else:
        from obsdiff.runtime.generate import call_options, generate
        from obsdiff.runtime.pipeline import load

        pipe = load(model, device="cpu")
        pipe.components["transformer"].to(torch.float32)
        options = call_options(pipe, model, {"num_inference_steps": CALL["steps"]})
        generate(pipe, PROMPTS, range(len(PROMPTS)), options, "latent")
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12, help="heads of 64 (default: 768 wide)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), args.child[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", args.heads, args.layers)
        size = sum(file.stat().st_size for file in (model / "transformer").iterdir())
        print(f"random SD3, {args.layers} blocks, {64 * args.heads} wide: denoiser {size / 1e6:.0f} MB")
        peaks = {}
        for packages in (0, 1, 8):
            command = [sys.executable, __file__, "--child", str(model), str(packages), f"{folder}/out{packages}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[packages] = int(done.stdout.split()[-1])
        print(f"load and sample only: peak {peaks[0] / 1e6:.0f} MB")
        for packages in (1, 8):
            need = predicted(model, packages)
            print(
                f"{packages} package(s): peak {peaks[packages] / 1e6:.0f} MB, "
                f"{(peaks[packages] - peaks[0]) / 1e6:.0f} MB above that; "
                f"Hessians of the largest package {need['hessians'] / 1e6:.0f} MB; "
                f"predicted before the start {sum(need.values()) / 1e6:.0f} MB"
            )
    print(json.dumps(environment()))


if __name__ == "__main__":
    main()
