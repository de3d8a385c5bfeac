"""The Python interface: names that import what they need when they are used, and stages that can be called."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import obsdiff
from obsdiff.errors import GateError, InputError, ObsdiffError

LIGHT = """
import json, sys
import obsdiff
heavy = lambda: [name for name in ("torch", "diffusers", "transformers", "onnxruntime", "numpy") if name in sys.modules]
found = {"import": heavy()}
obsdiff.InputError, dir(obsdiff), obsdiff.__version__
found["names"] = heavy()
obsdiff.prune, obsdiff.export
found["stages"] = heavy()
import obsdiff.cli
found["cli"] = heavy()
found["callable"] = [callable(obsdiff.prune), callable(obsdiff.export)]
from obsdiff import *
found["star"] = sorted(name for name in obsdiff.__all__ if name in globals())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a fresh interpreter has loaded after each step."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("step", ["import", "names", "stages", "cli"])
def test_torch_is_not_imported_before_it_is_used(fresh: dict[str, Any], step: str) -> None:
    assert fresh[step] == []


def test_the_stages_can_be_called_before_anything_else_was_imported(fresh: dict[str, Any]) -> None:
    assert fresh["callable"] == [True, True]


def test_a_star_import_gives_all_public_names(fresh: dict[str, Any]) -> None:
    assert fresh["star"] == sorted(obsdiff.__all__)


@pytest.mark.parametrize("name", obsdiff.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(obsdiff, name) is getattr(obsdiff, name)
    assert name in dir(obsdiff)


@pytest.mark.parametrize("name", ["prun", "pruned", "evaluat", "_HIDDEN", "torch"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'obsdiff' has no attribute '{name}'"):
        getattr(obsdiff, name)


def test_a_stage_is_a_package_and_a_function(tmp_path: Path) -> None:
    import obsdiff.export.bundle
    import obsdiff.prune.solvers

    assert obsdiff.prune.solvers.NM(2, 4).sparsity == 0.5
    assert obsdiff.export.bundle.SCHEMA_VERSION >= 1
    with pytest.raises(InputError, match="does not exist"):
        obsdiff.prune("nowhere", tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(InputError, match="does not exist"):
        obsdiff.export("nowhere", tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(InputError, match="does not exist"):
        obsdiff.load("nowhere")
    with pytest.raises(InputError, match="at least one path"):
        obsdiff.bench([])
    assert list(tmp_path.iterdir()) == []


def test_the_errors_say_what_the_command_line_exits_with() -> None:
    assert (obsdiff.ObsdiffError, obsdiff.InputError, obsdiff.GateError) == (ObsdiffError, InputError, GateError)
    assert (ObsdiffError.exit_code, InputError.exit_code, GateError.exit_code) == (1, 2, 3)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("name", ["2:4", "unstructured"])
def test_the_mathematics_alone(name: str) -> None:
    from obsdiff.prune.solvers import NM, Unstructured, solve

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(32, 64, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    solution = solve(weight, hessian, NM(2, 4) if name == "2:4" else Unstructured(0.5))
    assert solution.weight.shape == solution.mask.shape == weight.shape
    assert solution.mask.dtype == torch.bool
    assert not solution.weight[~solution.mask].any()
    assert solution.mask.float().mean() == 0.5
    difference = weight - solution.weight
    lost = torch.trace(difference @ hessian @ difference.T) / torch.trace(weight @ hessian @ weight.T)
    assert solution.error == pytest.approx(lost.sqrt().item(), rel=1e-3)
    assert solution.error < solve(weight, hessian, NM(2, 4), solver="magnitude").error


def test_the_solvers_load_nothing_of_the_rest() -> None:
    code = (
        "import sys, obsdiff.prune.solvers; "
        "print([n for n in sys.modules if n.startswith('obsdiff.') and not n.startswith('obsdiff.prune')], "
        "'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['obsdiff.callable']", "False"]
