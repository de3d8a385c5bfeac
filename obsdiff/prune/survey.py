"""What pruning each layer would do to the denoiser's output, measured on the dense model before anything is pruned."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.files import read_json, write_json
from obsdiff.hooks import named_arguments
from obsdiff.models import walk
from obsdiff.models.layers import as_matrix, from_matrix
from obsdiff.models.walk import Stage
from obsdiff.prune import ranks
from obsdiff.prune.calibration import Calibration, Collector, run_batches, sampler_hessians, whole_denoiser
from obsdiff.prune.hessian import Hessians, mean
from obsdiff.prune.packages import by_block, cut
from obsdiff.prune.recipe import PACKAGES
from obsdiff.prune.solvers import Unstructured, relative_error
from obsdiff.prune.solvers.auto import sample_rows
from obsdiff.prune.solvers.obs import obs
from obsdiff.prune.stream import stream_hessians
from obsdiff.prune.structured import remove_obs

Curve = list[tuple[float, float]]
"""(amount, error): the sparsity or the units that stay, and the squared relative error of the denoiser's output."""

PROMPTS = 16  # enough for an order of the layers, a part of the calibration's cost
CALLS = 4  # of the denoiser, spread over the steps, to feel each layer's weight in the output
STEP = 0.1
KEPT = "survey.json"  # in the prune's working folder: what was measured before an interruption


@dataclasses.dataclass(frozen=True)
class Survey:
    """curves: by linear (full name) or by group stage; outliers: by linear, the share of |w| ‖x‖ above five times its
    mean (OWL, arXiv 2310.05175); of one recorded call, block_inputs: keyword arguments by block, tokens: by linear."""

    curves: dict[str, Curve]
    outliers: dict[str, float]
    probe: "Probe"

    @property
    def names(self) -> list[str]:
        return [*self.curves, *self.outliers]

    @property
    def tokens(self) -> dict[str, int]:
        return self.probe.tokens

    @property
    def block_inputs(self) -> dict[int, dict[str, Any]]:
        return self.probe.block_inputs


def survey(run: Calibration, stages: Sequence[Stage], stored: Mapping[str, Tensor]) -> Survey:
    """Measures every stage over a few prompts; block by block in a stream where the family's blocks form one chain.

    A curve's shape is the layer's own OBS error over the amount; its height is what one measured amount did to the
    output of the whole denoiser on recorded calls.
    """
    recipe = run.recipe.model_copy(update={"solver": "obs", "target": "symmetric"})
    ordered = sorted(stages, key=lambda stage: stage.block)
    # Nothing is pruned between packages: where each costs a run of the sampler, the prune's few are as good.
    packages = by_block(ordered) if run.spec.carried else cut(ordered, recipe.packages or PACKAGES)
    calibrate = stream_hessians if run.spec.carried else sampler_hessians
    batches = run.batches[: max(1, PROMPTS // recipe.batch_size)]

    def advance(_count: int, note: str) -> None:
        run.advance(0, f"measuring what each layer is worth, {note}")  # not among the work that was promised

    few = dataclasses.replace(run, batches=batches, recipe=recipe, advance=advance)
    probe = Probe(run)
    kept = run.folder / KEPT
    found = ranks.from_first(read_json(kept) if kept.exists() else {"curves": {}, "outliers": {}})
    curves: dict[str, Curve] = {name: [(x, y) for x, y in curve] for name, curve in found["curves"].items()}
    outliers: dict[str, float] = found["outliers"]
    measured = curves.keys() | outliers.keys()
    done = {k for k, package in enumerate(packages) if _names(package) <= measured}
    for k, hessians in calibrate(few, packages, done):
        if hessians is None:
            continue
        ranks.add_up(hessian for parts in hessians.values() for hessian in parts)
        for stage in packages[k]:
            if stage.group:
                curves[stage.name] = _group_curve(stage, hessians, stored, run, probe)
            elif recipe.allocation == "owl":
                outliers |= _outliers(stage, hessians, stored)
            else:
                curves |= _linear_curves(stage, hessians, stored, run, probe)
        if not ranks.rank():
            write_json(kept, {"curves": curves, "outliers": outliers})
    return Survey(curves, outliers, probe)


def _names(package: Sequence[Stage]) -> set[str]:
    """What a survey of the package measures: group stages, or linears."""
    return {name for stage in package for name in ([stage.name] if stage.group else stage.touched)}


class Probe:
    """Calls of the dense denoiser that were recorded once, to be run again with other weights."""

    def __init__(self, run: Calibration):
        self._run, self._denoiser = run, run.denoiser
        kept: list[dict[str, Any]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(named_arguments(module.forward, args, kwargs))

        handle = run.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        first = ranks.from_first(run.batches[:1])  # the same on every rank, one without prompts of its own included
        with whole_denoiser(run):
            run_batches(dataclasses.replace(run, batches=first), Collector(run, []))
        handle.remove()
        self._calls = kept[:: max(1, len(kept) // CALLS)][:CALLS]
        self.tokens: dict[str, int] = {}
        self.block_inputs: dict[int, dict[str, Any]] = {}
        self._record(run)
        self._expected = self._outputs()

    def _record(self, run: Calibration) -> None:
        """One more call, for what blocks are called with and how many tokens linears see."""

        def keep_inputs(number: int, block: nn.Module) -> Callable[..., None]:
            return lambda _module, args, kwargs: self.block_inputs.__setitem__(
                number, named_arguments(block.forward, args, kwargs)
            )

        def keep_tokens(name: str, rows: int) -> Callable[..., None]:
            return lambda _module, _args, output: self.tokens.__setitem__(name, output.numel() // rows)

        handles = [
            block.module.register_forward_pre_hook(keep_inputs(block.number, block.module), with_kwargs=True)
            for block in walk.blocks_of(run.denoiser, run.spec)
        ]
        for name, module in run.denoiser.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                handles.append(module.register_forward_hook(keep_tokens(name, len(module.weight))))
        with whole_denoiser(run):
            self.call(run.denoiser)()
        for handle in handles:
            handle.remove()

    def call(self, denoiser: nn.Module) -> Callable[[], Any]:
        """What runs a denoiser on the first recorded call."""

        @torch.no_grad()
        def run() -> Any:
            return denoiser(**self._calls[0])

        return run

    @torch.no_grad()
    def error(self, tensors: Mapping[str, Tensor]) -> float:
        """The squared relative error of the outputs with these tensors in the place of the denoiser's own."""
        parameters = dict(self._denoiser.named_parameters())
        own = {name: parameters[name].clone() for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        outputs = self._outputs()
        for name, tensor in own.items():
            parameters[name].copy_(tensor)
        lost = sum(float((a - b).square().sum()) for a, b in zip(outputs, self._expected, strict=True))
        return lost / sum(float(b.square().sum()) for b in self._expected)

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        with whole_denoiser(self._run):
            outputs = [self._denoiser(**{**call, "return_dict": False})[0] for call in self._calls]
        return [torch.stack(list(output)).float() for output in outputs]  # a tensor, or a list of one for each picture


def _linear_curves(
    stage: Stage, hessians: Hessians, stored: Mapping[str, Tensor], run: Calibration, probe: Probe
) -> dict[str, Curve]:
    sparsity = run.recipe.sparsity or 0.5
    low, high = min(0.05, sparsity), max(0.95, sparsity)
    grid = [s for k in range(-9, 10) if low <= (s := sparsity + STEP * k) <= high]
    curves = {}
    for shared in stage.linears:
        hessian = mean(hessians[shared]).hessian
        for name in shared:
            own = stored[f"{name}.weight"].to(hessian.device).float()
            weight = as_matrix(own)
            part = sample_rows(weight)
            errors = [relative_error(part, obs(part, hessian, Unstructured(s))[0], hessian) ** 2 for s in grid]
            pruned = obs(weight, hessian, Unstructured(sparsity))[0]
            height = probe.error({f"{name}.weight": from_matrix(pruned, own.shape)}) / max(
                relative_error(weight, pruned, hessian) ** 2, 1e-12
            )
            curves[name] = [(s, error * height) for s, error in zip(grid, errors, strict=True)]
    return curves


def _outliers(stage: Stage, hessians: Hessians, stored: Mapping[str, Tensor]) -> dict[str, float]:
    found = {}
    for shared in stage.linears:
        norms = mean(hessians[shared]).hessian.diagonal().clamp(min=0).sqrt()
        for name in shared:
            score = as_matrix(stored[f"{name}.weight"]).to(norms.device).float().abs() * norms
            found[name] = (score > 5 * score.mean()).float().mean().item()
    return found


def fewest_units(units: int) -> int:
    """Where a group's curve ends, and with it what an allocation may take: no group does without a quarter."""
    return max(1, units // 4)


def _group_curve(
    stage: Stage, hessians: Hessians, stored: Mapping[str, Tensor], run: Calibration, probe: Probe
) -> Curve:
    assert stage.group
    block = run.denoiser.get_submodule(stage.parent)
    units, spans = walk.unit_count(block, stage.group), walk.reader_spans(block, stage.group)
    readers = [shared[0] for shared in stage.linears]
    means = [mean(hessians[shared]).hessian for shared in stage.linears]
    own = [stored[f"{name}.weight"].to(means[0].device) for name in readers]
    weights = [as_matrix(weight) for weight in own]
    path = remove_obs(weights, means, units, fewest_units(units), spans=spans).losses
    if not path:
        return [(float(units), 0.0)]
    middle = len(path) // 2
    pruned = remove_obs(weights, means, units, units - middle - 1, spans=spans).weights
    changed = zip(readers, pruned, own, strict=True)
    error = probe.error({f"{name}.weight": from_matrix(new, old.shape) for name, new, old in changed})
    height = error / max(path[middle], 1e-12)
    return [(float(units), 0.0), *((float(units - k), height * lost) for k, lost in enumerate(path, 1))]
