"""Benchmarks: every script answers --help, runs at its smallest, and counts what it says it counts."""

import gzip
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from obsdiff.measure import fashion
from obsdiff.prune.solvers import NM, is_nm

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = (
    "engines",
    "families",
    "gpu",
    "paper_tables",
    "prune_memory",
    "real_sizes",
    "serving",
    "structured_speed",
    "train_fashion",
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the files and the format of Fashion-MNIST, 300 pictures a split, every item."""
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = generator.integers(0, 256, (300, 28, 28), dtype=np.uint8)
        labels = np.arange(300, dtype=np.uint8) % 10
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_how_to_run_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


@pytest.mark.slow
def test_prune_memory_runs_as_a_script() -> None:
    command = [sys.executable, str(FOLDER / "prune_memory.py"), "--heads", "1", "--layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"random SD3, 2 blocks, 64 wide: denoiser [\d.]+ MB", done.stdout)
    for packages in (1, 8):
        assert re.search(rf"^{packages} package\(s\): peak \d+ MB, -?\d+ MB above that; Hessians", done.stdout, re.M)


def test_what_is_predicted_are_two_hessians_for_each_input_of_the_largest_package(tmp_path: Path) -> None:
    module = script("prune_memory")
    model = module.make_model(tmp_path / "model", heads=1, layers=2)
    joint, last = 6 * 64**2 + 2 * 256**2, 4 * 64**2 + 256**2  # of every input that linears share, once
    assert module.predicted(model, 1)["hessians"] == 2 * 4 * (joint + last)
    assert module.predicted(model, 8)["hessians"] < module.predicted(model, 1)["hessians"]


def test_structured_speed_compares_what_the_macs_promise(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("structured_speed")
    module.compare("embedded", [bundles["dense"], bundles["structured"]], module._axes(2, 8, 12), runs=2)
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"embedded: dense [\d.]+ ms, shrunk [\d.]+ ms, speed-up [\d.]+ \(median of pairs\), "
        r"the MACs promise 1\.\d+: \d+% of it\n",
        said,
    )


@pytest.mark.slow
def test_train_fashion_trains_everything_and_resumes(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("train_fashion")
    parse = module.parse_arguments

    def shorter() -> object:
        args = parse()
        args.minutes = dict.fromkeys(args.minutes, 1e-4)
        return args

    monkeypatch.setattr(module, "parse_arguments", shorter)
    command = ["train_fashion.py", "--out", str(tmp_path / "out"), "--data", str(photographs), "--smoke"]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.endswith("starts")] == list(module.PHASES)
    assert "| pictures | item_accuracy |" in said
    from obsdiff.models.source import find_source

    assert find_source(tmp_path / "out" / "pipeline").config["num_layers"] == 8
    assert {"results.json", "samples.png", "classifier.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(module.data, "evaluate", lambda *_: [])
    module.main()
    assert capsys.readouterr().out.count("is there") == len(module.PHASES)


def test_photographs_are_padded_and_labelled(photographs: Path, tmp_path: Path) -> None:
    data = script("fashion_data")
    grey, items = data.photographs(photographs, "train", 20)
    assert (tuple(grey.shape), grey.dtype, items.tolist()) == ((20, 32, 32), torch.uint8, [*range(10)] * 2)
    assert not grey[:, :2].any()
    assert not grey[:, :, -2:].any()
    assert grey[:, 2:-2, 2:-2].float().mean() > 100
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.photographs(tmp_path, "train")


def test_paint_keeps_white_and_reaches_the_tint() -> None:
    data = script("fashion_data")
    grey = torch.zeros(10, 32, 32, dtype=torch.uint8)
    grey[:, 5, 5], grey[:, 6, 6] = 200, 100
    painted = data.paint(grey, torch.arange(10))
    assert torch.equal(painted[:, :, 0, 0], torch.ones(10, 3))
    torch.testing.assert_close(painted[:, :, 5, 5], 2 * data.TINTS - 1)
    torch.testing.assert_close(painted[:, :, 6, 6], data.TINTS)
    assert torch.equal(data.paint(grey * 0, torch.arange(10)), torch.ones(10, 3, 32, 32))


def test_no_held_out_pair_is_ever_drawn() -> None:
    data = script("fashion_data")
    items = torch.arange(10).repeat(200)
    colours = data.draw_colours(items, 3, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in colours.tolist())
    pairs = zip(items.repeat_interleave(3).tolist(), colours.flatten().tolist(), strict=True)
    drawn = {(fashion.COLOURS[colour], fashion.ITEMS[item]) for item, colour in pairs}
    assert drawn.isdisjoint(fashion.HELD_OUT)
    assert len(drawn) == 100 - len(fashion.HELD_OUT)


def test_captions_are_tabulated_by_what_they_say() -> None:
    data = script("fashion_data")
    tokenizer = data.train_tokenizer()
    assert len(tokenizer) == 614
    ids, counts = data.caption_ids(tokenizer)
    assert counts.sum() == len(fashion.captions())
    torch.manual_seed(0)
    items, colours = torch.full((500,), 3), torch.full((500,), 4)
    captions = tokenizer.batch_decode(data.draw_captions(ids, counts, items, colours), skip_special_tokens=True)
    parsed = [fashion.parse_caption(caption.replace(" - ", "-")) for caption in captions]
    assert set(parsed) == {(3, 4), (3, None), (None, 4), (None, None)}
    assert 0.6 < parsed.count((3, 4)) / 500 < 0.9


def test_rows_become_a_table() -> None:
    data = script("fashion_data")
    assert data.markdown([{"pictures": "noise", "frechet_distance": 1.23456}]).splitlines() == [
        "| pictures | item_accuracy | colour_accuracy | frechet_distance | held_out_item_accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| noise |  |  | 1.235 |  |",
    ]


def run_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, found: dict[str, int], *options: str) -> None:
    """benchmarks/gpu.py with two parts that count their calls: the first works, the second fails."""
    gpu = script("gpu")

    def works() -> dict[str, object]:
        found["works"] = found.get("works", 0) + 1
        return {"rows": [{"variant": "2:4", "ms": 1.23456}]}

    def fails() -> dict[str, object]:
        found["fails"] = found.get("fails", 0) + 1
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(gpu, "parts", lambda _small: iter([gpu.Part("works", 1, works), gpu.Part("fails", 1, fails)]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--out", str(out), *options])
    gpu.main()


def test_the_gpu_benchmark_keeps_each_part_and_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, int] = {}
    run_gpu(monkeypatch, tmp_path, found)
    run_gpu(monkeypatch, tmp_path, found)
    assert found == {"works": 1, "fails": 1}, "what is there is not measured again, what failed only when asked"
    run_gpu(monkeypatch, tmp_path, found, "--again")
    assert found == {"works": 1, "fails": 2}
    state = json.loads((tmp_path / "gpu.json").read_text())
    assert state["parts"]["works"]["rows"] == [{"variant": "2:4", "ms": 1.23456}]
    assert "out of memory" in state["parts"]["fails"]["failed"]
    assert "| 2:4 | 1.235 |" in (tmp_path / "gpu.md").read_text()


def test_the_gpu_benchmark_leaves_out_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "DEVICE", "cuda")
    monkeypatch.setattr(gpu, "parts", lambda _small: iter([gpu.Part("long", 30, lambda: pytest.fail("begun"))]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--minutes", "20"])
    gpu.main()
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("name", ["sd3-medium", "flux.1-dev"])
def test_real_denoisers_in_small_are_what_they_say(name: str) -> None:
    gpu, models = script("gpu"), script("gpu_models")
    source = script("real_sizes").read_source(name, **gpu.SMALL[name])
    inputs = models.call_inputs(source, 64, 2, torch.float32, "cpu")
    sizes = []
    for variant in models.VARIANTS:
        module = models.build(source, variant, "cpu", torch.float32)
        output = models.eager(module, source, inputs)()
        assert output.isfinite().all()
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
        if variant == "2:4":
            weights = [module.get_submodule(one).weight for one in models.prunable(module, source)]
            assert all(is_nm(weight != 0, NM(2, 4)) for weight in weights)
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]
    wanted = set(models.prunable(module, source))
    assert wanted <= {gemm.name for gemm in models.products(source, inputs)}
