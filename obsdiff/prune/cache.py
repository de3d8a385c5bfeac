"""Activations between two passes of a block: in memory up to a limit, on disk beyond it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from obsdiff.files import write_tensors


class ActivationCache:
    """Named tensors by number. Those that do not fit into `limit` bytes of memory go to files in `folder`."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit, self._used = folder, limit, 0
        self._held: dict[int, Mapping[str, Tensor]] = {}

    def put(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores them in the place of what has that number. Raises ObsdiffError when the disk is full."""
        self._used -= _bytes(self._held.pop(number, {}))
        size = _bytes(tensors)
        if self._used + size <= self._limit:
            self._held[number] = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            self._used += size
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file(number), {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def get(self, number: int) -> Mapping[str, Tensor]:
        """Raises KeyError for a number that was never put."""
        if number in self._held:
            return self._held[number]
        if not self._file(number).exists():
            raise KeyError(number)
        return load_file(self._file(number))

    def close(self) -> None:
        """Forgets everything and removes the files."""
        self._held.clear()
        self._used = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06}.safetensors"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
