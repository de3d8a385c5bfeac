"""2:4 only where it pays: layers whose sparse product is not faster than the dense one stay as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obsdiff import checkpoint
from obsdiff.errors import InputError
from obsdiff.files import read_json
from obsdiff.gemm_times import Dtype, GemmTable, Shape, Timer, measure_gemms
from obsdiff.models import walk
from obsdiff.models.gemms import find_gemms
from obsdiff.models.source import Source, meta_denoiser
from obsdiff.progress import Progress
from obsdiff.prune.recipe import Recipe
from obsdiff.prune.work import STATE


def keep_dense(
    source: Source, recipe: Recipe, known: GemmTable | None, progress: Progress, timer: Timer | None = None
) -> Recipe:
    """The recipe with the times of its layers' products, and the layers that stay dense.

    Products are those of one picture at the recipe's size and guidance, in its dtype, or float16 where that is none
    that sparse tensor cores take. Their times are the recipe's own (--gemm-table), else those `known` of an earlier
    start of this prune, else measured on the recipe's device.
    Raises InputError when a product is not in the table, nothing can be measured here, or no layer is faster.
    """
    if not recipe.only_faster:
        return recipe
    shapes = product_shapes(source, recipe)
    dtype: Dtype = "bfloat16" if recipe.dtype == "bfloat16" else "float16"
    table = recipe.gemm_table
    if table is None and known and all(known.find(shape, dtype) for shape in shapes.values()):
        table = known
    if table is None:
        try:
            table = measure_gemms(shapes.values(), dtype, recipe.device, timer, progress)
        except InputError as error:
            raise InputError(f"--only-faster: {error}; --gemm-table FILE takes a table from elsewhere") from None
    times = {name: table.find(shape, dtype) for name, shape in shapes.items()}
    if missing := next((name for name, time in times.items() if time is None), None):
        rows, out, inner = shapes[missing]
        raise InputError(
            f"--gemm-table: it has no {rows} rows times {out}×{inner}, the product of {missing} at {recipe.height}×"
            f"{recipe.width} pixels: measure it there at this size"
        )
    left = tuple(name for name, time in times.items() if time and not time.faster)
    if len(left) == len(times):
        best = max((t.dense_ms / t.sparse_ms for t in times.values() if t and t.sparse_ms), default=0.0)
        raise InputError(
            f"--only-faster: none of the {len(times)} layers is faster with 2:4 weights on {table.device} "
            f"(the best takes {best:.2f} times as long dense as sparse), so there is nothing to prune"
        )
    progress.message(f"{len(left)} of {len(times)} layers stay dense: 2:4 makes them no faster on {table.device}")
    used = {(t.rows, t.shape, t.dtype): t for t in times.values() if t}
    table = table.model_copy(update={"entries": tuple(used[key] for key in sorted(used))})
    return recipe.model_copy(update={"gemm_table": table, "left_dense": left})


def product_shapes(source: Source, recipe: Recipe) -> dict[str, Shape]:
    """The product of every layer that would be pruned, by its name."""
    if not source.spec.inputs:
        raise InputError(f"--only-faster: obsdiff does not know what {source.spec.denoiser} is called with")
    axes = {
        "batch": source.spec.passes_at(recipe.guidance_scale),
        "height": recipe.height // source.vae_scale,
        "width": recipe.width // source.vae_scale,
        "tokens": source.prompt_tokens,
    }
    denoiser = meta_denoiser(source)
    stages = walk.linear_stages(denoiser, source.spec, recipe.blocks, recipe.include, recipe.exclude)
    names = {name for stage in stages for name in stage.touched}
    gemms = find_gemms(denoiser, source.spec, source.config, axes)
    return {gemm.name: (gemm.rows, *gemm.shape) for gemm in gemms if gemm.name in names}


def earlier_table(out: Path, work: Path) -> GemmTable | None:
    """What an earlier start of the prune measured: times are never the same twice, and it must go on with the same."""
    recipe: Mapping[str, Any] = {}
    if (work / STATE).exists():
        recipe = read_json(work / STATE).get("recipe", {})
    elif out.is_dir() and (info := checkpoint.read_info(out)):
        recipe = info.recipe
    try:
        return GemmTable.model_validate(recipe.get("gemm_table"))
    except ValidationError:  # none, or one of another version
        return None
