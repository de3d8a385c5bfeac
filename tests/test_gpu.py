"""What only a CUDA GPU can show: run with `pytest -m gpu` there."""

from pathlib import Path

import pytest
import torch

from obsdiff.measure import quality
from obsdiff.prune.hessian import Hessian, mean
from obsdiff.prune.solvers import NM, is_nm, solve
from obsdiff.prune.stage import prune
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hessians_accumulate_in_float32(dtype: torch.dtype) -> None:
    tokens = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_gpu, on_cpu = Hessian(256, "cuda"), Hessian(256)
    on_gpu.add(tokens.cuda())
    on_cpu.add(tokens)
    torch.testing.assert_close(mean([on_gpu]).hessian.cpu(), mean([on_cpu]).hessian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["obs", "alps", "wanda", "magnitude"])
def test_solvers_give_on_a_gpu_what_they_give_on_a_cpu(solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 128, generator=generator), torch.randn(1024, 128, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    there = solve(weight.cuda(), hessian.cuda(), NM(2, 4), solver)
    here = solve(weight, hessian, NM(2, 4), solver)
    assert is_nm(there.mask.cpu(), NM(2, 4))
    assert there.error == pytest.approx(here.error, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"calibration": "stream", "offload": True}], ids=str)
def test_a_prune_on_a_gpu_draws_like_one_on_a_cpu(tmp_path: Path, options: dict[str, object]) -> None:
    quick = {"pattern": "2:4", "num_prompts": 16, "steps": 8, "device": "cuda", "dtype": "float32"}
    prune("fashion", tmp_path / "pruned", **quick, **options)
    drawn = []
    for path in ("fashion", tmp_path / "pruned"):
        pipe = load(path, device="cpu")
        drawn.append(quality.draw(pipe, ["a red ankle boot", "teal trousers"], (0, 1), call_options(pipe, path)))
    assert quality.latent_error(drawn[1], drawn[0]) < 0.2


def test_bundles_draw_the_same_on_a_gpu(bundles: dict[str, Path]) -> None:
    drawn = []
    for device in ("cpu", "cuda"):
        pipe = load(bundles["structured"], "torch", device)
        options = call_options(pipe, bundles["structured"])
        drawn.append(quality.draw(pipe, ["a red ankle boot", "teal trousers"], (0, 1), options))
    assert quality.latent_error(drawn[1], drawn[0]) < 1e-3


def test_onnxruntime_draws_the_same_on_its_cuda_provider(bundles: dict[str, Path]) -> None:
    drawn = []
    for device in ("cpu", "cuda"):
        pipe = load(bundles["dense"], "onnxruntime", device)
        options = call_options(pipe, bundles["dense"])
        drawn.append(quality.draw(pipe, ["a red ankle boot", "teal trousers"], (0, 1), options))
    assert quality.latent_error(drawn[1], drawn[0]) < 1e-3
