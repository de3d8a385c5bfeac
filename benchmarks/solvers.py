"""The solvers against each other on single layers: error, error on fresh inputs, time; all sides in one run.

    python benchmarks/solvers.py [layers] [samples] [structured] [block]

layers: OBS, ALPS and auto at 16 inputs a column, synthetic inputs and those of the embedded model's own layers.
samples: auto against OBS from 1 to 32 inputs a column.
structured: heads removed by Schur updates against a new inverse for every head, at 24 heads of 64.
block: all linears of an SD3-medium-sized joint block at 2:4, against a plain implementation of the paper's procedure.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.measure.environment import environment
from obsdiff.models.source import DATA
from obsdiff.prune.hessian import mean
from obsdiff.prune.solvers import NM, Pattern, Unstructured, relative_error, solve
from obsdiff.prune.solvers.obs import damped
from obsdiff.prune.structured import greedy_units

CALL = {"max_sequence_length": 333 - 12, "prompt_tokens": 333}  # zeros in the place of a third encoder's tokens
PATTERNS: tuple[Pattern, ...] = (NM(2, 4), Unstructured(0.5))


def inputs_maker(width: int, decay: float, seed: int = 0) -> Callable[[int, int], Tensor]:
    """Draws inputs [n, width] whose covariance has the eigenvalues k^-decay, in a random basis and at random scales."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    spectrum = torch.arange(1, width + 1).float() ** (-decay / 2)
    scales = torch.exp(0.5 * torch.randn(width, generator=generator))

    def draw(count: int, seed: int) -> Tensor:
        return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spectrum @ basis.T * scales

    return draw


def low_rank_maker(width: int, rank: int = 128, noise: float = 0.5, seed: int = 0) -> Callable[[int, int], Tensor]:
    """Draws inputs [n, width] that are `rank` directions and noise: what the figures of other tools were taken on."""
    mixing = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)) / rank**0.5

    def draw(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        correlated = torch.randn(count, rank, generator=generator) @ mixing
        return correlated + noise * torch.randn(count, width, generator=generator)

    return draw


def input_kinds(width: int) -> dict[str, Callable[[int, int], Tensor]]:
    """What inputs are drawn like, by name."""
    spectra = {f"spectrum k^-{decay}": inputs_maker(width, decay) for decay in (0.7, 1.0)}
    return {**spectra, "rank 128 and noise": low_rank_maker(width)}


def second_moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def timed(function: Callable[[], Any], runs: int = 3) -> tuple[Any, float]:
    """The result and the shortest of the times, after one run that does not count unless there is one alone."""
    times: list[float] = []
    result = function() if runs > 1 else None
    for _ in range(runs):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return result, min(times)


def compare(name: str, weight: Tensor, halves: tuple[Tensor, Tensor], fresh: Tensor, runs: int = 3) -> None:
    """Prints ALPS and auto as ratios to OBS. halves: Hessians of the even and of the odd inputs."""
    both = (halves[0] + halves[1]) / 2
    for pattern in PATTERNS:
        base, seconds = timed(lambda p=pattern: solve(weight, both, p, "obs"), runs)  # type: ignore[misc]
        held = relative_error(weight, base.weight, fresh)
        print(f"{name}, {pattern}: OBS {base.error:.4f}, fresh inputs {held:.4f}, {seconds:.2f} s")
        for label, call in (
            ("alps, damping 0.01", lambda p=pattern: solve(weight, both, p, "alps", damping=0.01)),
            ("alps", lambda p=pattern: solve(weight, both, p, "alps")),
            ("auto", lambda p=pattern: solve(weight, halves[0], p, "auto", held_out=halves[1])),
        ):
            found, taken = timed(call, runs)
            choice = f", took {found.choice.solver} {found.choice.damping}" if found.choice else ""
            print(
                f"  {label}: {found.error / base.error:.3f} x OBS, fresh inputs "
                f"{relative_error(weight, found.weight, fresh) / held:.3f} x, time {taken / seconds:.1f} x{choice}"
            )


def layers() -> None:
    for rows, width in ((512, 1024), (1536, 1536)):
        for kind, draw in input_kinds(width).items():
            weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) / width**0.5
            halves = second_moment(draw(8 * width, 11)), second_moment(draw(8 * width, 12))
            compare(f"{rows}x{width}, {kind}", weight, halves, second_moment(draw(16 * width, 13)))
    for name in ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"):
        weight, inputs = embedded_layer(f"transformer_blocks.3.{name}")
        width = weight.shape[1]
        fresh, used = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :][-16 * width :]
        halves = second_moment(used[: len(used) // 2]), second_moment(used[len(used) // 2 :])
        compare(f"embedded model, {name} {list(weight.shape)}", weight, halves, second_moment(fresh))


def embedded_layer(name: str, prompts: int = 64, steps: int = 12) -> tuple[Tensor, Tensor]:
    """A weight of the embedded model, and what it gets while the sampler runs: [tokens, in], prompt after prompt."""
    from obsdiff.models.source import find_source, load_pipeline
    from obsdiff.prune.recipe import read_prompts

    pipe = load_pipeline(find_source("fashion"), torch.float32)
    module = pipe.components["transformer"].get_submodule(name)
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    texts = read_prompts(DATA / "prompts" / "fashion.txt")[:prompts]
    options = {"height": 32, "width": 32, "num_inference_steps": steps, "guidance_scale": 4.0}
    pipe(texts, **options, max_sequence_length=0, generator=torch.Generator().manual_seed(0), output_type="latent")
    handle.remove()
    calls = torch.stack(found, 1)  # [2 * prompts, steps, tokens, in]
    order = torch.arange(len(calls)).view(2, -1).T.flatten()  # both guidance passes of a prompt together
    return module.weight.detach(), calls[order].reshape(-1, calls.shape[-1]).contiguous()


def samples() -> None:
    width = 512
    for kind, draw in input_kinds(width).items():
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / width**0.5
        fresh = second_moment(draw(40 * width, 13))
        for pattern in PATTERNS:
            row = []
            for share in (1, 1.5, 2, 4, 8, 16, 32):
                count = int(share * width) // 2
                halves = second_moment(draw(count, 11)), second_moment(draw(count, 12))
                base = solve(weight, (halves[0] + halves[1]) / 2, pattern, "obs")
                found = solve(weight, halves[0], pattern, "auto", held_out=halves[1])
                ratio = relative_error(weight, found.weight, fresh) / relative_error(weight, base.weight, fresh)
                assert found.choice
                row.append(f"{share:g}: {ratio:.3f} ({found.choice.solver} {found.choice.damping:g})")
            print(f"auto / OBS on fresh inputs, {kind}, {pattern}, by inputs a column: {', '.join(row)}")


def structured(heads: int = 24, size: int = 64, keep: int = 17) -> None:
    width = heads * size
    hessian = damped(second_moment(inputs_maker(width, 0.7)(8 * width, 1)), 0.01)
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(2))
    (alive, _), fast = timed(lambda: greedy_units([weight], [hessian], heads, keep), 5)
    print(f"choosing {heads - keep} of {heads} heads of {size} by Schur updates: {fast:.3f} s")
    for label, every in (("each head that goes", False), ("each head that could go", True)):
        kept, slow = timed(lambda every=every: reinvert(weight, hessian, heads, keep, every), 2 - every)  # type: ignore[misc]
        same = "the same heads" if kept == alive.nonzero().flatten().tolist() else f"other heads: {kept}"
        print(f"  a new inverse for {label}: {slow:.2f} s, {slow / fast:.1f} x, {same}")


def reinvert(weight: Tensor, hessian: Tensor, heads: int, keep: int, every: bool) -> list[int]:
    """The same greedy removal without updates: inverses of what is left, one a removal or one a candidate."""
    size = len(hessian) // heads
    alive, work = list(range(heads)), weight.clone()
    while len(alive) > keep:
        columns = torch.cat([torch.arange(h * size, (h + 1) * size) for h in alive])
        left = hessian[columns][:, columns]
        inverse = torch.linalg.inv(left)
        losses = []
        for k in range(len(alive)):
            block = slice(k * size, (k + 1) * size)
            part, own = work[:, columns[block]], torch.linalg.inv(left) if every and k else inverse
            losses.append(((part @ torch.linalg.inv(own[block, block])) * part).sum())
        worst = int(torch.stack(losses).argmin())
        block = slice(worst * size, (worst + 1) * size)
        part = work[:, columns[block]]
        work[:, columns] -= part @ torch.linalg.inv(inverse[block, block]) @ inverse[block]
        del alive[worst]
    return alive


def block_times(prompts: int, steps: int, device: str = "cpu", heads: int = 24) -> dict[str, Any]:
    """A random SD3 of the medium's width, a joint block to prune and one behind it, 1024 image and 333 text tokens.

    Plain: for each of four packages the sampler runs again, every linear collects its own Hessian, OBS solves.
    Ours: obsdiff.prune with ALPS, one recorded run and a pass over a quarter of its calls. Same prompts, same noise;
    errors are those on the dense model's inputs for a prompt that neither saw.
    """
    from prune_memory import make_model

    from obsdiff.checkpoint import denoiser_weights
    from obsdiff.models import walk
    from obsdiff.models.source import find_source, load_pipeline
    from obsdiff.prune import calibration
    from obsdiff.prune.recipe import make_recipe, read_prompts
    from obsdiff.prune.stage import prune

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", heads=heads, layers=2, position_size=64)
        (model / "generation_config.json").write_text(
            json.dumps({"max_sequence_length": 333 - 12, "prompt_tokens": 333})
        )
        source = find_source(model)
        captions = read_prompts(DATA / "prompts" / "fashion.txt")
        options: dict[str, Any] = {
            "prompts": captions[:prompts],
            "steps": steps,
            "guidance_scale": 1.0,
            "height": 256,
            "width": 256,
            "blocks": "0:1",
            "batch_size": 1,
            "device": device,
            "dtype": "float32",
        }

        def calibrate(**changes: Any) -> calibration.Calibration:
            recipe = make_recipe(source, {**options, "solver": "obs", **changes})
            pipe = load_pipeline(source, torch.float32).to(device)
            batches = calibration.encode_prompts(pipe, source.spec, recipe, device)
            sampler, denoiser = calibration.sampler_of(pipe, device), pipe.components["transformer"]
            return calibration.Calibration(
                sampler, denoiser, source.spec, batches, recipe, device, folder, lambda *_: None
            )

        start = time.perf_counter()
        run = calibrate()
        packages = walk.linear_stages(run.denoiser, source.spec, "0:1")
        for package in packages:
            linears = [(linear,) for shared in package.linears for linear in shared]
            collector = calibration.Collector(run, linears)
            with collector.listening():
                calibration.run_batches(run, collector)
            for (linear,), hessians in collector.hessians.items():
                module = walk.linear(run.denoiser, linear)
                module.weight.data = solve(module.weight.data, mean(hessians).hessian, NM(2, 4), "obs").weight
        plain, plain_weights = time.perf_counter() - start, run.denoiser.state_dict()

        start = time.perf_counter()
        prune(model, folder / "ours", pattern="2:4", solver="alps", calibration="stream", call_share=0.25, **options)
        ours = time.perf_counter() - start
        pruned = denoiser_weights(folder / "ours" / "transformer")

        fresh = calibrate(prompts=captions[prompts : prompts + 1], seed=99)
        collector = calibration.Collector(fresh, [shared for package in packages for shared in package.linears])
        with collector.listening():
            calibration.run_batches(fresh, collector)
        rows: list[dict[str, Any]] = []
        for shared, hessians in collector.hessians.items():
            for linear in shared:
                weight, hessian = walk.linear(fresh.denoiser, linear).weight.data, mean(hessians).hessian
                both = plain_weights[f"{linear}.weight"], pruned[f"{linear}.weight"].to(device)
                slow, fast = (relative_error(weight, one, hessian) for one in both)
                rows.append({"linear": linear, "plain_error": slow, "error": fast})
    return {
        "prompts": prompts,
        "steps": steps,
        "plain_s": plain,
        "ours_s": ours,
        "plain_error": sum(row["plain_error"] for row in rows) / len(rows),
        "error": sum(row["error"] for row in rows) / len(rows),
        "rows": rows,
    }


def block(prompts: int, steps: int) -> None:
    found = block_times(prompts, steps)
    plain, ours, rows = found["plain_s"], found["ours_s"], found["rows"]
    print(f"2:4, all {len(rows)} linears of a 1536-wide joint block, {prompts} prompts, {steps} steps")
    print(f"  plain: {plain:.0f} s, ours: {ours:.0f} s, {ours / plain:.2f} of it")
    for row in rows:
        slow, fast = row["plain_error"], row["error"]
        print(f"  {row['linear']}: error on fresh inputs {slow:.4f} plain, {fast:.4f} ours, {fast / slow:.3f}")
    print(f"  mean error on fresh inputs {found['plain_error']:.4f} plain, {found['error']:.4f} ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["layers", "samples", "structured", "block"])
    parser.add_argument("--prompts", type=int, default=12, help="block: calibration prompts")
    parser.add_argument("--steps", type=int, default=6, help="block: steps of the sampler")
    args = parser.parse_args()
    for part in args.parts:
        {
            "layers": layers,
            "samples": samples,
            "structured": structured,
            "block": lambda: block(args.prompts, args.steps),
        }[part]()
    print(json.dumps(environment()))


if __name__ == "__main__":
    main()
