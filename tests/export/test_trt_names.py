"""Every name of TensorRT's that we use is one of its bindings': also those that only run on a GPU."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import obsdiff.export

FILES = ("tensorrt", "trt_build", "trt_log", "trt_profile", "trt_run")
CLASSES = {
    "builder": ["Builder"],
    "network": ["INetworkDefinition"],
    "parser": ["OnnxParser"],
    "config": ["IBuilderConfig", "IRuntimeConfig"],
    "profile": ["IOptimizationProfile"],
    "cache": ["ITimingCache", "IRuntimeCache"],
    "runtime": ["Runtime"],
    "engine": ["ICudaEngine"],
    "context": ["IExecutionContext"],
}
"""What our variables hold."""
OURS = {"engine.layers", "engine.run"}  # trt_profile's engines are not TensorRT's
RTX_ONLY = {
    "trt.ComputeCapability",
    "trt.ComputeCapability.__members__",
    "trt.DynamicShapesKernelSpecializationStrategy",
    "trt.DynamicShapesKernelSpecializationStrategy.EAGER",
    "trt.EngineInvalidityDiagnostics",
    "trt.EngineInvalidityDiagnostics.__members__",
    "trt.EngineValidity",
    "trt.EngineValidity.INVALID",
    "cache.deserialize",
    "config.create_runtime_cache",
    "engine.create_runtime_config",  # TensorRT 10.16 and later have it too
    "config.set_execution_context_allocation_strategy",
    "config.dynamic_shapes_kernel_specialization_strategy",
    "config.num_compute_capabilities",
    "config.set_compute_capability",
    "config.set_runtime_cache",
    "runtime.get_engine_validity",
}


def used_names() -> set[str]:
    """Attributes that our code takes of the library and of its objects, such as trt.Builder and engine.name."""
    return {name for file in FILES for name in names_in(Path(obsdiff.export.__path__[0], f"{file}.py").read_text())}


def names_in(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and (name := ast.unparse(node)).isprintable():
            owner, *rest = name.split(".")
            if owner in ("trt", *CLASSES) and all(part.isidentifier() for part in rest):
                yield f"{owner}.{'.'.join(rest[:2] if owner == 'trt' else rest[:1])}"


def missing_names(trt: Any) -> list[str]:
    """Of the names that we use, those that the library lacks."""
    missing = []
    for name in sorted(used_names() - OURS):
        owner, *rest = name.split(".")
        holders = [trt] if owner == "trt" else [getattr(trt, kind) for kind in CLASSES[owner] if hasattr(trt, kind)]
        for part in rest:
            holders = [getattr(holder, part) for holder in holders if hasattr(holder, part)]
        if not holders:
            missing.append(name)
    return missing


def test_names_are_found() -> None:
    assert {"trt.Builder", "trt.BuilderFlag.TF32", "context.execute_async_v3", "engine.get_tensor_name"} <= used_names()


def test_every_name_is_in_tensorrt_rtx() -> None:
    assert missing_names(pytest.importorskip("tensorrt_rtx")) == []


@pytest.mark.tensorrt
def test_every_name_is_in_tensorrt() -> None:
    assert set(missing_names(importlib.import_module("tensorrt"))) <= RTX_ONLY
