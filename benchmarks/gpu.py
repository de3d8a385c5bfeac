"""What only a CUDA GPU can show, the most valuable first, into gpu.json and gpu.md.

    python benchmarks/gpu.py --out benchmarks/results/NAME [--minutes 20] [--only speed] [--list]

tests: the tests marked gpu. prune: a whole prune of a random SD3-medium in the setting of OBS-Diff (arXiv 2510.06751,
100 prompts, 25 steps, 512 pixels, guidance 7, 4 packages; there under 15 minutes on an RTX 4090). plain: the same
layers by a plain implementation of the paper's procedure, beside ours. speed: dense, 2:4 and structured denoisers of
real size, eager and compiled with CUDA graphs, in turn. gemms: sparse against dense products at these models' shapes.

It needs torch, diffusers and what obsdiff itself needs for pruning. Each result is written as soon as it is there; the
same command goes on behind it, and a part that broke off is not begun again without --again.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obsdiff.errors import ObsdiffError
from obsdiff.files import read_json, write_json
from obsdiff.measure.environment import environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PAPER = {"num_prompts": 100, "steps": 25, "height": 512, "width": 512, "guidance_scale": 7.0, "packages": 4}
RUNS = 15


@dataclass(frozen=True)
class Part:
    """`minutes` is about what it takes on an H200: a part that does not fit into what is left is not begun."""

    name: str
    minutes: float
    run: Callable[[], dict[str, Any]]


def parts(small: bool) -> Iterator[Part]:
    """All parts in the order of their worth. `small`: every part at a size that a CPU takes seconds for."""
    yield Part("tests", 3, tests)
    yield Part("speed sd3-medium 1024 px batch 1 bf16", 2, lambda: speed("sd3-medium", 1024, 1, "bf16", small))
    yield Part("prune sd3-medium obs", 8, lambda: prune_medium("obs", small))
    yield Part("speed flux.1-dev 1024 px batch 1 bf16", 4, lambda: speed("flux.1-dev", 1024, 1, "bf16", small))
    yield Part("gemms bf16", 1, lambda: gemm_table("bf16", small))
    yield Part("plain", 3, lambda: plain(small))
    for name, minutes in (("sd3-medium", 2), ("sd3.5-large", 3), ("flux.1-dev", 4)):
        for pixels, batch, dtype in ((1024, 4, "bf16"), (512, 1, "bf16"), (512, 4, "bf16"), (1024, 1, "fp16")):
            title = f"speed {name} {pixels} px batch {batch} {dtype}"
            yield Part(title, minutes, lambda n=name, p=pixels, b=batch, d=dtype: speed(n, p, b, d, small))  # type: ignore[misc]
    yield Part("speed sd3.5-large 1024 px batch 1 bf16", 3, lambda: speed("sd3.5-large", 1024, 1, "bf16", small))
    yield Part("gemms fp16", 1, lambda: gemm_table("fp16", small))
    yield Part("prune sd3-medium auto", 10, lambda: prune_medium("auto", small))


def tests() -> dict[str, Any]:
    """pytest's own last line. The names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider", "--no-header"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    return {"summary": lines[-1], "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}


def prune_medium(solver: str, small: bool) -> dict[str, Any]:
    """Seconds and peak memory of a whole prune at 2:4."""
    from gpu_models import random_pipeline

    from obsdiff.prune.stage import prune

    setting: dict[str, Any] = PAPER | (SMALL_CALL if small else {})
    with tempfile.TemporaryDirectory() as folder:
        model = random_pipeline(Path(folder) / "model", "sd3-medium", **(SMALL["sd3-medium"] if small else {}))
        _reset()
        start = time.perf_counter()
        info = prune(
            model, Path(folder) / "pruned", pattern="2:4", solver=solver, device=DEVICE, dtype="bfloat16", **setting
        )
        seconds = time.perf_counter() - start
        errors = [layer.error for layer in info.layers if layer.error is not None]
    return {
        "setting": setting,
        "solver": solver,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": _peak(),
        "layers": len(info.layers),
        "mean_error": sum(errors) / len(errors),
    }


def plain(small: bool) -> dict[str, Any]:
    """One joint block of SD3-medium's width, the plain procedure and ours: see solvers.py."""
    from solvers import block_times

    return block_times(prompts=2 if small else 24, steps=2 if small else 12, device=DEVICE, heads=2 if small else 24)


def speed(name: str, pixels: int, batch: int, kind: str, small: bool) -> dict[str, Any]:
    """Milliseconds of one denoiser call: each variant and the dense model in turn, in every way to run them."""
    import gpu_models as models
    from real_sizes import read_source

    from obsdiff.prune.timing import interleaved

    source, dtype = read_source(name, **(SMALL[name] if small else {})), DTYPES[kind]
    pixels = pixels // 8 if small else pixels
    inputs = models.call_inputs(source, pixels, batch, dtype, DEVICE)
    rows: list[dict[str, Any]] = []
    dense = models.build(source, "dense", DEVICE, dtype)
    ways: dict[str, Callable[[], Any]] = {"eager": models.eager(dense, source, inputs)}
    ways["eager"]()
    compiled = models.build(source, "dense", DEVICE, dtype)
    models.compile_blocks(compiled, source)
    ways["compiled"] = models.captured(models.eager(compiled, source, inputs))
    for variant in list(models.VARIANTS)[1:]:
        for way in models.WAYS[variant]:
            _reset()
            try:
                call, note = models.prepare(source, variant, way, inputs, DEVICE, dtype)
                base = ways["eager" if way == "eager" else "compiled"]
                dense_ms, ms = interleaved([base, call], 3 if small else RUNS)
            except (RuntimeError, ObsdiffError) as error:
                rows.append({"variant": variant, "way": way, "failed": str(error).splitlines()[0][:300]})
                continue
            finally:
                call = None  # type: ignore[assignment]
            rows.append(
                {"variant": variant, "way": way, "dense_ms": dense_ms, "ms": ms, "ratio": dense_ms / ms, **note}
            )
            _print(f"  {variant}, {way}: {ms:.2f} ms, dense {dense_ms:.2f} ms, {dense_ms / ms:.3f} ×")
    return {"model": name, "pixels": pixels, "batch": batch, "dtype": kind, "rows": rows}


def gemm_table(kind: str, small: bool) -> dict[str, Any]:
    """Sparse against dense at the shapes of all three models, 512 and 1024 pixels."""
    from gpu_models import gemm_rows
    from real_sizes import read_source

    sources = [read_source(name, **(changes if small else {})) for name, changes in SMALL.items()]
    return gemm_rows(kind, sources, (64, 128) if small else (512, 1024), DEVICE)


def write_markdown(state: Mapping[str, Any], path: Path) -> None:
    """The results as tables for people."""
    lines = [f"# {state['environment'].get('gpu', state['environment'].get('processor', ''))}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in state["environment"].items()), ""]
    for name, found in state["parts"].items():
        lines += [f"## {name}", ""]
        rows = found.get("rows")
        if rows:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
            lines += [f"| {' | '.join(_say(row.get(key, '')) for key in keys)} |" for row in rows]
        rest = {key: value for key, value in found.items() if key != "rows"}
        lines += ["", *(f"- {key}: {_say(value)}" for key, value in rest.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _say(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reset() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def _print(text: str) -> None:
    print(text, flush=True)


SMALL_CALL: dict[str, Any] = {"num_prompts": 2, "steps": 2, "height": 64, "width": 64}
SMALL: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256},
    "sd3.5-large": {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256},
    "flux.1-dev": {
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=60, help="begin no part that would end later")
    parser.add_argument("--only", default="", help="parts whose name begins so")
    parser.add_argument("--again", action="store_true", help="begin parts again that broke off or failed")
    parser.add_argument("--list", action="store_true", help="say what there is to do")
    parser.add_argument("--small", action="store_true", help="tiny models: to see that it runs, on a CPU too")
    args = parser.parse_args()
    todo: list[Part] = [part for part in parts(args.small) if part.name.startswith(args.only)]
    if args.list:
        return print("\n".join(f"{part.minutes:4.0f} min  {part.name}" for part in todo))
    if DEVICE == "cpu" and not args.small:
        sys.exit("no CUDA GPU is here: --small shows that the parts run")
    args.out.mkdir(parents=True, exist_ok=True)
    file, end = args.out / "gpu.json", time.monotonic() + 60 * args.minutes
    state: dict[str, Any] = read_json(file) if file.exists() else {"parts": {}}
    state["environment"] = environment()
    for part in todo:
        known = state["parts"].get(part.name)
        if known and not (args.again and ("failed" in known or "begun" in known)):
            continue
        if not args.small and time.monotonic() + 60 * part.minutes > end:
            _print(f"{part.name}: left out, about {part.minutes:.0f} minutes are not left")
            continue
        state["parts"][part.name] = {"begun": time.strftime("%Y-%m-%d %H:%M")}
        write_json(file, state)
        _print(part.name)
        start = time.monotonic()
        try:
            state["parts"][part.name] = part.run()
        except Exception as error:  # the next part may run
            state["parts"][part.name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            _print(f"  failed: {error}")
        state["parts"][part.name]["took_s"] = round(time.monotonic() - start, 1)
        write_json(file, state)
        write_markdown(state, args.out / "gpu.md")
        _reset()
    return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
