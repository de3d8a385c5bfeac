"""The folder a prune works in, OUT.partial: what is finished is kept there, and at the end it becomes the checkpoint.

state.json                  base and recipe: whose work this is
package-000/0000.safetensors ...    a finished package, one file a stage: tensors, packed masks, records
result/                     the checkpoint while it is written
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from obsdiff import checkpoint
from obsdiff.checkpoint import Allocation, CheckpointInfo, GroupRecord, LayerRecord
from obsdiff.errors import InputError
from obsdiff.files import read_json, write_json, write_tensors
from obsdiff.models.source import Source
from obsdiff.prune.solve import Solved

STATE = "state.json"
ALLOCATION = "allocation.json"
MASK = "mask/"


def claim(out: Path, work: Path, identity: Mapping[str, Any], restart: bool) -> CheckpointInfo | None:
    """Makes `work` ours, or says why not. Returns the checkpoint when this very prune is finished already."""
    if out.exists():
        info = checkpoint.read_info(out) if out.is_dir() else None
        same = info is not None and {"base": info.base, "recipe": info.recipe} == identity
        if same and not restart:
            shutil.rmtree(work, ignore_errors=True)  # killed between the last two steps
            return info
        if info is None:
            raise InputError(f"{out} exists and is not a pruned checkpoint: choose another name")
        if not restart:
            raise InputError(f"{out} is a checkpoint of another recipe: choose another name, or pass --restart")
    if work.exists():
        found = read_json(work / STATE) if (work / STATE).exists() else None
        if found is None and any(path.name != f".{STATE}.part" for path in work.iterdir()):
            raise InputError(f"{work} is not a working folder of obsdiff: remove it, or choose another name")
        if restart:
            shutil.rmtree(work)
        elif found not in (None, identity):
            raise InputError(f"{work} is left from a prune with another recipe: remove it, or pass --restart")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / STATE, identity)
    return None


def abandon(work: Path) -> None:
    """Removes the folder of a prune that was refused before its first package was finished."""
    if not any(work.glob("package-???")):
        shutil.rmtree(work, ignore_errors=True)


def package_folder(work: Path, number: int) -> Path:
    return work / f"package-{number:03}"


@contextlib.contextmanager
def package(work: Path, number: int) -> Iterator[Callable[[int, Solved], None]]:
    """Gives what saves a solved stage of the package by its index; when the body ends well the package is finished."""
    folder = package_folder(work, number)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()

    def save(index: int, solved: Solved) -> None:
        masks = {f"{MASK}{name}": checkpoint.pack(mask) for name, mask in solved.masks.items()}
        records = {
            "layers": [record.model_dump() for record in solved.layers],
            "groups": [record.model_dump() for record in solved.groups],
        }
        write_tensors(part / f"{index:04}.safetensors", {**solved.tensors, **masks}, {"records": json.dumps(records)})

    yield save
    part.rename(folder)


def read_allocation(work: Path) -> Allocation | None:
    return Allocation.model_validate(read_json(work / ALLOCATION)) if (work / ALLOCATION).exists() else None


def write_allocation(work: Path, allocation: Allocation) -> None:
    """Keeps it: latencies are never the same twice, and a prune that goes on must go on with the same amounts."""
    write_json(work / ALLOCATION, allocation.model_dump(mode="json"))


class Finished:
    """What the finished packages hold. `tensors` are read when asked for; a later package's win."""

    def __init__(self, work: Path, packages: Iterable[int]):
        folders = [package_folder(work, number) for number in packages]
        self.files = [path for folder in folders if folder.exists() for path in sorted(folder.iterdir())]
        self.tensors = checkpoint.TensorFiles(self.files)
        self.layers: dict[str, LayerRecord] = {}
        self.groups: list[GroupRecord] = []
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                records = json.loads(file.metadata()["records"])
            self.layers |= {layer["name"]: LayerRecord(**layer) for layer in records["layers"]}
            self.groups += [GroupRecord(**group) for group in records["groups"]]

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bit-packed, by linear."""
        return {name.removeprefix(MASK): self.tensors[name] for name in self.tensors if name.startswith(MASK)}


def finish(source: Source, identity: Mapping[str, Any], finished: Finished, work: Path, out: Path) -> CheckpointInfo:
    """Puts the packages together as a checkpoint, which takes the place of `out`; the working folder goes."""
    info = CheckpointInfo(
        **identity,
        versions=checkpoint.versions(),
        threads=torch.get_num_threads(),
        layers=list(finished.layers.values()),
        groups=finished.groups,
        allocation=read_allocation(work),
    )
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    checkpoint.write_checkpoint(source, info, finished.tensors, finished.masks, result)
    if out.exists():  # set aside whole: an interruption must not leave half a checkpoint
        shutil.rmtree(work / "replaced", ignore_errors=True)
        out.rename(work / "replaced")
    result.rename(out)
    shutil.rmtree(work)
    return info
