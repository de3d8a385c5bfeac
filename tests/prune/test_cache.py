"""Activations in memory up to a limit and on disk beyond it."""

from pathlib import Path

import pytest
import torch
from disk import full_disk
from torch import Tensor

from obsdiff.errors import ObsdiffError
from obsdiff.prune.cache import ActivationCache

SIZE = 4 * 3 * 5


def entry(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A float32 tensor of SIZE bytes, or as many values of another dtype."""
    return {"hidden": torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)}


def files(folder: Path) -> int:
    return len([path for path in folder.rglob("*") if path.is_file()])


@pytest.mark.parametrize(("limit", "spilled"), [(0, 6), (SIZE, 5), (3 * SIZE, 3), (3 * SIZE + 1, 3), (1 << 40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fits_stays_in_memory_and_the_rest_comes_back_from_disk(
    tmp_path: Path, limit: int, spilled: int, dtype: torch.dtype
) -> None:
    cache = ActivationCache(tmp_path / "cache", limit // (4 // dtype.itemsize) if limit < 1 << 40 else limit)
    for number in range(6):
        cache.put(number, entry(number, dtype))
    assert files(tmp_path) == spilled
    for number in range(6):
        found = cache.get(number)["hidden"]
        assert found.dtype == dtype
        assert torch.equal(found, entry(number, dtype)["hidden"])


def test_without_a_need_no_folder_is_made(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", SIZE)
    cache.put(0, entry(0))
    cache.close()
    assert not list(tmp_path.iterdir())


def test_closing_removes_the_files_and_forgets_everything(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", SIZE)
    for number in range(3):
        cache.put(number, entry(number))
    assert files(tmp_path) == 2
    cache.close()
    assert not list(tmp_path.iterdir())
    for number in range(3):
        with pytest.raises(KeyError):
            cache.get(number)
    cache.put(0, entry(0))
    assert files(tmp_path) == 0, "its memory is free again"


def test_what_replaces_an_entry_takes_its_place_in_the_count(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", 2 * SIZE)
    for round_ in range(5):
        for number in (0, 1):
            cache.put(number, entry(10 * round_ + number))
    assert files(tmp_path) == 0
    assert torch.equal(cache.get(1)["hidden"], entry(41)["hidden"])
    cache.put(2, entry(2))
    assert files(tmp_path) == 1


@pytest.mark.parametrize("larger_first", [True, False])
def test_an_entry_that_moves_between_memory_and_disk_is_the_latest(tmp_path: Path, larger_first: bool) -> None:
    cache = ActivationCache(tmp_path / "cache", SIZE)
    small, large = entry(1), {"hidden": torch.arange(1000.0)}
    order = [large, small] if larger_first else [small, large]
    for tensors in (*order, *order):
        cache.put(0, tensors)
        assert torch.equal(cache.get(0)["hidden"], tensors["hidden"])
    cache.put(1, small)
    assert torch.equal(cache.get(1)["hidden"], small["hidden"])


def test_what_was_never_put_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        ActivationCache(tmp_path / "cache", 0).get(3)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_views_that_share_memory_come_back_as_they_were(tmp_path: Path, limit: int) -> None:
    whole = torch.randn(2, 6, 4)
    cache = ActivationCache(tmp_path / "cache", limit)
    cache.put(0, {"text": whole[:, :2], "image": whole[:, 2:]})
    cache.put(1, {"text": whole[:1], "image": whole[1:]})
    assert torch.equal(cache.get(0)["image"], whole[:, 2:])
    assert torch.equal(cache.get(1)["text"], whole[:1])


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", 0)
    with full_disk(1000), pytest.raises(ObsdiffError, match=r"000007\.safetensors could not be written") as caught:
        cache.put(7, {"hidden": torch.zeros(10_000)})
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == 0, "nothing half written is left"
