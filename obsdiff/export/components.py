"""The VAE's decoder and the text encoders as ONNX graphs, so that no module of PyTorch has to run at all.

Each takes and returns what its pipeline was seen to pass and to read, is checked against PyTorch as the denoiser is,
and lies in its component's folder, beside the weights that the torch backend runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from obsdiff.errors import InputError
from obsdiff.export import onnx, parity, schema
from obsdiff.export.recorded import LATENTS, Call, record
from obsdiff.export.schema import Axis, Check, Graph, Precision
from obsdiff.export.totals import default_axes
from obsdiff.models import Input, ModelSpec, graph
from obsdiff.models.source import Source, load_pipeline
from obsdiff.progress import Progress

COMPONENTS = ("denoiser", "vae", "text_encoders")
LONGEST = 2048  # tokens: what a language model could read beyond is no prompt
SMALL = 32  # latents along a side that a decoder is checked at: it is the same at every size, and large ones are dear


def choose(source: Source, wanted: Sequence[str]) -> list[str]:
    """The pipeline's own names of the components that `wanted` asks for beside the denoiser, which is always there.

    Raises InputError for a name that is unknown, or one that this pipeline has nothing for.
    """
    if unknown := [name for name in wanted if name not in COMPONENTS]:
        raise InputError(f"--components {unknown[0]}: there are {', '.join(COMPONENTS)}")
    there = [name for name, entry in source.index.items() if isinstance(entry, list) and entry[-1]]
    own = {
        "vae": [name for name in there if name == "vae"],
        "text_encoders": [name for name in there if name.startswith("text_encoder")],
    }
    for name in wanted:
        if name in own and not own[name]:
            raise InputError(f"--components {name}: a {source.index['_class_name']} has none")
    return [part for name in own if name in wanted for part in own[name]]


class TensorComponent(nn.Module):
    """A component as a function of its tensors, in the order of `inputs`, that returns what is read of its answer."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], first: Mapping[str, Any]):
        super().__init__()
        self.module, self.inputs, self.outputs, self.first = module, list(inputs), list(outputs), dict(first)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, inputs, strict=True))
        if self.inputs == [LATENTS]:
            return (self.module.decode(*inputs, return_dict=False)[0],)  # type: ignore[operator]
        for name, value in self.first.items():  # graphs take masks as integers
            if isinstance(value, Tensor):
                named[name] = named[name].to(value.dtype)
        answer = self.module(**{**self.first, **named})
        return tuple(_read(answer, path) for path in self.outputs)


def _read(answer: Any, path: str) -> Tensor:
    for key in path.split(".")[1:]:
        answer = answer[int(key)] if key.lstrip("-").isdigit() else getattr(answer, key)
    return answer


@dataclasses.dataclass(frozen=True)
class Plan:
    """A component's graph before it is made."""

    module: TensorComponent
    spec: ModelSpec  # the denoiser's, with the component's inputs
    outputs: list[tuple[str | int, ...]]  # their axes
    axes: dict[str, Axis]
    constants: dict[str, Any]
    scale: int


def export_components(
    source: Source,
    denoiser: nn.Module,
    names: Sequence[str],
    axes: Mapping[str, Axis],
    precision: Precision,
    work: Path,
    progress: Progress,
) -> dict[str, Graph]:
    """Writes and checks a graph for each of the named components in its folder of `work`.

    `denoiser` is the float32 one that the pipeline is run with once. Raises InputError for a component that this
    pipeline does not call in a way that a graph could take, ObsdiffError for one that cannot be traced or disagrees.
    """
    progress.advance(1, f"watching {', '.join(names)}")
    pipe: Any = load_pipeline(source, torch.float32, **{source.spec.component: denoiser})
    calls = record(pipe, source, names, axes)
    plans = {
        name: _plan_decoder(source, pipe.vae, calls[name][0][0], axes)
        if name == "vae"
        else _plan_encoder(source, pipe, name, calls[name], axes)
        for name in names
    }
    graphs = {}
    for name, plan in plans.items():
        progress.advance(1, f"tracing {name} to onnx")
        graphs[name] = _export(name, plan, source.config, _own_precision(plan.module.module, precision), work)
    return graphs


def _own_precision(module: Any, precision: Precision) -> Precision:
    """float32 for a decoder whose config says that it overflows in fp16."""
    upcast = precision == "fp16" and getattr(module.config, "force_upcast", False)
    return "fp32" if upcast and hasattr(module, "decode") else precision


def _plan_decoder(source: Source, vae: Any, call: Call, axes: Mapping[str, Axis]) -> Plan:
    latents = call.arguments[LATENTS]
    if extra := [name for name in call.arguments if name != LATENTS]:
        raise InputError(f"--components vae: the pipeline decodes with {extra[0]}, which a graph does not take")
    if latents.ndim not in (4, 5):
        raise InputError(f"--components vae: it decodes {latents.ndim}-dimensional latents, not pictures or frames")
    side = default_axes(source)["height"]
    sides = {name: axes.get(name) or Axis(min=side, opt=side, max=side) for name in ("height", "width")}
    # From 2 on: previews are small, and of any shape.
    own = {name: Axis(min=2, opt=axis.opt, max=max(axis.max, SMALL)) for name, axis in sides.items()}
    middle = tuple(latents.shape[1:-2])
    module = TensorComponent(vae, [LATENTS], ["sample"], {})
    with torch.no_grad():
        (picture,) = module(latents[:1])
    scale = source.vae_scale
    if picture.shape[-2:] != tuple(size * scale for size in latents.shape[-2:]):
        raise InputError(f"--components vae: it does not make {scale} pixels of each latent along a side")
    return Plan(
        module,
        dataclasses.replace(source.spec, inputs=(Input(LATENTS, ("batch", *middle, "height", "width")),)),
        [("batch", *picture.shape[1:-2], "height", "width")],
        {"batch": _batch(axes), **own},
        {},
        scale,
    )


def _plan_encoder(source: Source, pipe: Any, name: str, runs: Sequence[list[Call]], axes: Mapping[str, Axis]) -> Plan:
    encoder, first = pipe.components[name], runs[0][0]
    every = [call for run in runs for call in run]
    tensors = {key for key, value in first.arguments.items() if isinstance(value, Tensor)}
    constants = {key: value for key, value in first.arguments.items() if key not in tensors}
    if odd := [key for key, value in constants.items() if not isinstance(value, (bool, int, float, str))]:
        raise InputError(f"--components text_encoders: {name} takes {odd[0]}, which is no tensor, number or word")
    for call in every:
        if {key for key, value in call.arguments.items() if isinstance(value, Tensor)} != tensors or any(
            call.arguments.get(key) != value for key, value in constants.items()
        ):
            raise InputError(f"--components text_encoders: {name} is not always called with the same arguments")
    for key in sorted(tensors):
        if first.arguments[key].ndim != 2 or first.arguments[key].is_floating_point():
            raise InputError(f"--components text_encoders: {name} takes {key}, which holds no tokens of prompts")
    lengths = {call.arguments[key].shape[1] for call in every for key in tensors}
    tokens: str | int = "tokens" if len(lengths) > 1 else lengths.pop()
    own = {"batch": _batch(axes)}
    if tokens == "tokens":
        longest = max(lengths)
        own["tokens"] = Axis(min=1, opt=longest, max=max(longest, _longest(source, pipe, name, encoder)))
    words = encoder.get_input_embeddings().num_embeddings
    inputs = tuple(
        Input(key, ("batch", tokens), "int64", draw=words if int(value.max()) > 1 else 2)
        for key, value in first.arguments.items()
        if key in tensors
    )
    reads = {path: value for call in every for path, value in call.reads.items()}
    outputs: list[tuple[str | int, ...]] = [
        tuple(
            "batch" if i == 0 else "tokens" if i == 1 and tokens == "tokens" and _moves(runs, path) else size
            for i, size in enumerate(value.shape)
        )
        for path, value in reads.items()
    ]
    encoder.set_attn_implementation("eager")  # decomposing PyTorch's own for a graph fails on T5's bias
    module = TensorComponent(encoder, [entry.name for entry in inputs], list(reads), first.arguments)
    return Plan(module, dataclasses.replace(source.spec, inputs=inputs), outputs, own, constants, 1)


def _moves(runs: Sequence[list[Call]], path: str) -> bool:
    """Whether the second axis of an output is not the same in all calls."""
    return len({call.reads[path].shape[1] for run in runs for call in run if path in call.reads}) > 1


def _batch(axes: Mapping[str, Axis]) -> Axis:
    batch = axes.get("batch") or Axis(min=1, opt=1, max=8)
    return batch.model_copy(update={"min": 1})


def _longest(source: Source, pipe: Any, name: str, encoder: Any) -> int:
    """The longest prompt that a pipeline may be asked to encode and the encoder has positions for."""
    tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
    usual = max(int(getattr(tokenizer, "model_max_length", 0)), source.spec.tokens[2])
    positions = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    return min(usual, int(positions or LONGEST), LONGEST)


def _export(name: str, plan: Plan, config: Mapping[str, Any], precision: Precision, work: Path) -> Graph:
    """Writes the graph, runs it in ONNX Runtime on random inputs, and says what it takes and gives."""
    small = {
        key: axis.model_copy(update={"opt": min(axis.opt, SMALL)}) if key in ("height", "width") else axis
        for key, axis in plan.axes.items()
    }
    shapes = parity.check_shapes(small)
    module, spec, dtype = plan.module.eval(), plan.spec, parity.DTYPES[precision]
    expected = []
    for seed, sizes in enumerate(shapes):
        with torch.no_grad():
            expected.append(module(*graph.random_inputs(spec, config, sizes, seed=seed).values()))
    cast_module(module.module, dtype)
    path = work / schema.component_graph(name)
    types = onnx.write_graph(module, f"the {name}", module.outputs, spec, config, plan.axes, path)
    run = onnx.open_graph(path, precision)
    checks = []
    for k, output in enumerate(module.outputs):

        def one(k: int = k, **inputs: Tensor) -> Tensor:
            return run(**inputs)[k]

        wanted = [outputs[k] for outputs in expected]
        label = f"graph of {name} ({output})"
        checks.append(parity.compare(one, wanted, spec, config, shapes, precision, name=label))
    kind = str(dtype).removeprefix("torch.")
    return Graph(
        inputs=[_signature(entry.name, entry.dtype or kind, cast(Any, entry.axes)) for entry in spec.inputs],
        outputs=[_signature(*entry) for entry in zip(module.outputs, types, plan.outputs, strict=True)],
        constants=plan.constants,
        axes=plan.axes,
        scale=plan.scale,
        check=_worst(checks),
    )


def _signature(name: str, dtype: str, axes: Sequence[str | int]) -> schema.Tensor:
    return schema.Tensor.model_validate({"name": name, "dtype": dtype, "axes": tuple(axes)})


def _worst(checks: Sequence[Check]) -> Check:
    return checks[0].model_copy(
        update={
            "max_difference": max(check.max_difference for check in checks),
            "relative_error": max(check.relative_error for check in checks),
        }
    )


def cast_module(module: nn.Module, dtype: torch.dtype) -> None:
    """The module in another precision, but for the layers that its class keeps in float32 beside fp16 (T5's)."""
    module.to(dtype)
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, part in module.named_modules():
        if dtype == torch.float16 and name.rpartition(".")[2] in kept:
            part.float()
