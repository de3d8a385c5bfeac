"""Real models by their public configurations, on the meta device: sizes, work, and the memory of a prune. No weights.

The configurations in benchmarks/configs are those of the denoisers' config.json on the hub, written down from
knowledge; the parameter counts, which are public too, are checked. Nothing is computed, so nothing here is a timing.

    python benchmarks/real_sizes.py
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from obsdiff.checkpoint import versions
from obsdiff.export.totals import default_axes
from obsdiff.models import GroupRecord, ModelSpec, find_spec, graph, walk
from obsdiff.models.shrink import shrink
from obsdiff.models.source import Source, meta_denoiser
from obsdiff.prune import memory
from obsdiff.prune.plan import plan
from obsdiff.prune.recipe import Recipe, make_recipe
from obsdiff.prune.solve import units_to_keep
from obsdiff.prune.stage import tokens_of_call

CONFIGS = Path(__file__).parent / "configs"
NAMES = ("sd3-medium", "sd3.5-large", "flux.1-dev", "sdxl")
# SD3.5-large in OBS-Diff (arXiv 2510.06751): billions of parameters, and work over the dense model's 11.26 TFLOPs
PAPER = {0.15: (7.28, 9.63 / 11.26), 0.2: (7.02, 9.09 / 11.26), 0.25: (6.76, 8.55 / 11.26), 0.3: (6.54, 8.10 / 11.26)}
MODES: dict[str, dict[str, Any]] = {
    "default (sampler, 4 packages)": {},
    "sampler, 16 packages": {"packages": 16},
    "stream": {"calibration": "stream"},
    "stream, offload": {"calibration": "stream", "offload": True},
}


NOTES = """\
  Ours never takes more than was asked, so it keeps a little more: of 38 heads 15 % are 5.7, and 5 go; FFN widths end
  at a multiple of 64 from above (--round-to). The next column takes heads to the nearest and FFN widths as they
  come, which are the paper's sizes to the last digit.
  The paper's dense model has 11.26 TFLOPs, which is less than these MACs, those between queries, keys and values left
  out or not: it counts otherwise or fewer tokens. So work is compared as a share of the dense model's."""


def read_source(name: str, **changes: Any) -> Source:
    """A real model's source without its files; `changes` to its denoiser's config."""
    entry = json.loads((CONFIGS / f"{name}.json").read_text())
    config = entry["config"] | changes
    index = {"_class_name": entry["pipeline"], entry["component"]: ["diffusers", entry["denoiser"]]}
    spec = find_spec(entry["denoiser"], config, entry["component"])
    return Source(name=name, path=CONFIGS / name, index=index, spec=spec, config=config, defaults={})


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def attention_macs(source: Source, axes: Mapping[str, int]) -> int:
    """MACs of one call that multiply activations with each other."""
    denoiser = graph.TensorDenoiser(meta_denoiser(source), source.spec)
    inputs = graph.random_inputs(source.spec, source.config, axes, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(*inputs.values())
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if re.search("attention|bmm", str(operator))) // 2


def group_records(denoiser: nn.Module, spec: ModelSpec, recipe: Recipe) -> list[GroupRecord]:
    """The first units of every group as many as a uniform allocation keeps."""
    records = []
    for stage in walk.group_stages(denoiser, spec, recipe.blocks):
        assert stage.group
        units, kind = walk.unit_count(denoiser.get_submodule(stage.parent), stage.group), stage.group.kind
        kept = list(range(units_to_keep(recipe, kind, units)))
        records.append(GroupRecord(block=stage.block, name=stage.group.name, kind=kind, kept=kept, of=units))
    return records


def structured_size(source: Source, sparsity: float, **options: Any) -> tuple[int, int, Sequence[GroupRecord]]:
    """Parameters and MACs of one call once every group of the inner blocks has lost that share, and what stays."""
    recipe = make_recipe(source, {"pattern": "structured", "sparsity": sparsity, "allocation": "uniform", **options})
    denoiser = meta_denoiser(source)
    records = group_records(denoiser, source.spec, recipe)
    shrink(denoiser, source.spec, records)
    return count(denoiser), graph.count_macs(denoiser, source.spec, source.config, default_axes(source)), records


def memory_of(source: Source, options: dict[str, Any]) -> dict[str, float] | None:
    """Bytes by what they are for, as a prune predicts them for a GPU; None where the mode is not for the family."""
    recipe = make_recipe(source, {"device": "cuda", "dtype": "bfloat16", **options})
    if recipe.calibration == "stream" and not source.spec.carried:
        return None
    packages, denoiser = plan(source, recipe), meta_denoiser(source)
    shapes = memory.input_shapes(source, packages, recipe)
    return memory.predict(denoiser, source.spec, packages, recipe, tokens_of_call(source, recipe), shapes)


def print_sizes(name: str) -> None:
    source = read_source(name)
    denoiser = meta_denoiser(source)
    total, axes = count(denoiser), default_axes(source)
    stages = walk.linear_stages(denoiser, source.spec)
    layers = [walk.linear(denoiser, x) for stage in stages for shared in stage.linears for x in shared]
    prunable = sum(layer.weight.numel() for layer in layers)
    macs = graph.count_macs(denoiser, source.spec, source.config, axes)
    print(f"\n{name} ({source.spec.denoiser}, {source.spec.title})")
    print(
        f"  parameters {total / 1e9:.3f} B ({total}); {prunable / total:.1%} of them in {len(layers)} prunable layers"
    )
    products = attention_macs(source, axes)
    print(
        f"  one call at 1024 px with {axes['tokens']} prompt tokens, one image: {macs / 1e12:.2f} T MACs, "
        f"{products / 1e12:.2f} of them between queries, keys and values"
    )
    print("  memory of a prune (2:4, solver auto, batch 8, 512 px, bfloat16 on a GPU), predicted, GB:")
    for mode, options in MODES.items():
        need = memory_of(source, options)
        if need is None:
            print(f"    {mode}: not for this family, whose blocks form no chain")
            continue
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in need.items() if size)
        print(f"    {mode}: {sum(need.values()) / 1e9:.1f} ({parts})")


def print_structured(name: str = "sd3.5-large") -> None:
    source = read_source(name)
    dense = graph.count_macs(meta_denoiser(source), source.spec, source.config, default_axes(source))
    print(
        f"\n{name}, structured, first and last block left out: B parameters, MACs over the dense {dense / 1e12:.2f} T"
    )
    print("  share  paper        ours         heads to the nearest, any width  what stays (ours)")
    for share, (paper, work) in PAPER.items():
        size, macs, records = structured_size(source, share)
        heads = next(record.of for record in records if record.kind == "heads")
        nearest = round(heads * share) / heads + 1e-9
        exact, exact_macs, _ = structured_size(source, share, heads=nearest, round_to=1)
        print(
            f"  {share:.0%}    {paper:.2f}, {work:.3f}  {size / 1e9:.2f}, {macs / dense:.3f}  "
            f"{exact / 1e9:.2f}, {exact_macs / dense:.3f}                      {_say(records)}"
        )
    print(NOTES)


def _say(records: Sequence[GroupRecord]) -> str:
    kinds = {record.name: f"{record.name} {len(record.kept)} of {record.of}" for record in records}
    return ", ".join(kinds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), help=f"of {', '.join(NAMES)}")
    args = parser.parse_args()
    print("Real configurations on the meta device: " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    for name in args.names:
        print_sizes(name)
    if "sd3.5-large" in args.names:
        print_structured()


if __name__ == "__main__":
    main()
