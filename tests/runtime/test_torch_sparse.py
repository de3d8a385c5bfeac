"""The torch-sparse backend: what is refused, which layers are chosen, and what the receipt is told."""

from pathlib import Path

import pytest
import torch
from torch import nn

from obsdiff.errors import InputError
from obsdiff.export import receipt as receipts
from obsdiff.export.bundle import Manifest, open_bundle
from obsdiff.export.stage import export
from obsdiff.gemm_times import GemmTable, GemmTime
from obsdiff.models.gemms import Gemm
from obsdiff.runtime.backends import load_backend
from obsdiff.runtime.backends.torch_sparse import contiguous, evidence, plan, products

FAST, SLOW = 0.5, 1.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.slow, self.full = (nn.Linear(64, 32) for _ in range(3))
        self.narrow, self.conv = nn.Linear(24, 32), nn.Conv2d(16, 16, 1)
        for layer in (self.wide, self.slow, self.narrow):
            layer.weight.data[:, 0::4] = 0
            layer.weight.data[:, 1::4] = 0


GEMMS = [
    Gemm("wide", "wide", (32, 64), 8),
    Gemm("slow", "slow", (32, 64), 9),
    Gemm("full", "full", (32, 64), 8),
    Gemm("narrow", "narrow", (32, 24), 8),
    Gemm("conv", "conv", (16, 16), 8),
]


def table(*entries: tuple[int, tuple[int, int], float | None]) -> GemmTable:
    times = [
        GemmTime(rows=rows, shape=shape, dtype="float16", dense_ms=1.0, sparse_ms=sparse)
        for rows, shape, sparse in entries
    ]
    return GemmTable(device="a GPU", driver="", cuda="13.0", torch="2.13.0", entries=tuple(times))


def test_a_layer_is_sparse_where_it_may_be_and_gains() -> None:
    rows = plan(Model(), GEMMS, "fp16", "cuda", table((8, (32, 64), FAST), (9, (32, 64), SLOW)))
    assert [(row.name, row.sparse, row.reason) for row in rows] == [
        ("wide", True, ""),
        ("slow", False, "the dense kernel was faster"),
        ("full", False, "dense weights"),
        ("narrow", False, "K = 24 is no multiple of 16 (fp16)"),
    ]
    assert [(row.dense_ms, row.sparse_ms) for row in rows] == [(1.0, FAST), (1.0, SLOW), (None, None), (None, None)]


def test_what_was_not_timed_stays_dense() -> None:
    rows = plan(Model(), GEMMS, "bf16", "cuda", table((9, (32, 64), None)))
    assert [row.reason for row in rows[:2]] == ["not timed", "the dense kernel was faster"]


def test_the_receipt_takes_what_the_plan_tells() -> None:
    gemms = [Gemm(f"own.{gemm.name}", gemm.scope, gemm.shape, gemm.rows) for gemm in GEMMS]
    rows = plan(Model(), gemms, "fp16", "cuda", table((8, (32, 64), FAST), (9, (32, 64), SLOW)))
    named = {f"own.{name}": module for name, module in Model().named_modules()}
    plain = receipts.receipt_of(gemms, named, 10**6, "fp16", None)
    layers = {layer.name: layer for layer in receipts.merge(plain, evidence(rows, gemms)).layers}
    assert (layers["own.wide"].kernel, layers["own.wide"].dense_ms, layers["own.wide"].sparse_ms) == ("sparse", 1, FAST)
    assert (layers["own.slow"].kernel, layers["own.slow"].reason) == ("dense", "the dense kernel was faster")
    assert layers["own.conv"].kernel == "unknown"


def test_a_model_without_sparse_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"no linear can run sparse \(full: dense weights\): prune with --pattern 2:4"):
        plan(Model(), GEMMS[2:], "fp16", "cuda")


def test_a_cpu_and_float32_are_refused(graphless: Path) -> None:
    manifest = open_bundle(graphless)
    with pytest.raises(InputError, match="needs a CUDA GPU, and the device is cpu: use --backend torch"):
        load_backend("torch-sparse", graphless, manifest, "cpu")
    with pytest.raises(InputError, match=r"is in fp32, and sparse .* export it with --precision fp16"):
        load_backend("torch-sparse", graphless, manifest, "cuda")


@pytest.fixture(scope="module")
def bundle(pruned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    path = tmp_path_factory.mktemp("sparse") / "bundle"
    return path, export(pruned["2:4"], path, formats=(), precision="fp16")


def test_the_products_of_a_bundle_are_those_of_its_module(bundle: tuple[Path, Manifest]) -> None:
    from obsdiff.export.program import load_module

    path, manifest = bundle
    module, gemms = load_module(path, manifest, "cpu"), products(path, manifest)
    shapes = {(gemm.rows, gemm.shape, FAST) for gemm in gemms}
    rows = plan(module, gemms, "fp16", "cuda", table(*shapes))
    layers = dict(module.named_modules())
    assert {row.name for row in rows} == {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    assert sum(row.sparse for row in rows) > len(rows) / 2
    usual = {name: axis.opt for name, axis in manifest.axes.items()}
    block = next(gemm for gemm in gemms if gemm.name.endswith("blocks.0.ff.net.2"))
    assert block.rows == usual["batch"] * usual["height"] * usual["width"] // 4


def test_inputs_are_made_contiguous() -> None:
    stream = torch.randn(2, 9, 16)[:, :5]  # one stream of a joint attention
    with pytest.raises(RuntimeError):
        stream.view(-1, 16)
    (ready,) = contiguous(nn.Identity(), (stream,))
    assert torch.equal(ready, stream)
    ready.view(-1, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_computes_what_the_dense_module_does(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from obsdiff.models.graph import random_inputs
    from obsdiff.runtime.backends import torch_sparse
    from obsdiff.runtime.pipeline import bundle_source

    path = tmp_path / "bundle"
    manifest = export(pruned["2:4"], path, formats=(), precision=precision)  # type: ignore[arg-type]
    monkeypatch.setattr(GemmTime, "faster", property(lambda _: True))  # so small, dense is faster everywhere
    turned: list[nn.Linear] = []
    make = torch_sparse.make_sparse
    monkeypatch.setattr(torch_sparse, "make_sparse", lambda linear: (turned.append(linear), make(linear)))
    sparse, dense = (load_backend(name, path, manifest, "cuda") for name in ("torch-sparse", "torch"))
    assert turned
    config = bundle_source(path, manifest).config
    for seed, batch in enumerate((1, 2, 2, 2, 3)):
        usual = {name: axis.opt for name, axis in manifest.axes.items()} | {"batch": batch, "tokens": 7}
        dtype = getattr(torch, manifest.outputs[0].dtype)
        inputs = random_inputs(manifest.spec, config, usual, dtype, "cuda", seed)
        got, wanted = sparse(**inputs).float(), dense(**inputs).float()
        assert (got - wanted).norm() < (2e-2 if precision == "fp16" else 1e-1) * wanted.norm()


@pytest.mark.gpu
def test_a_dense_bundle_is_refused_on_a_gpu(graphless: Path, one_block_sd3: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    manifest = export(one_block_sd3, path, formats=(), precision="fp16")
    with pytest.raises(InputError, match="no linear can run sparse"):
        load_backend("torch-sparse", path, manifest, "cuda")
