"""What is known of a path before it is loaded, and whether its pictures can be compared with the reference's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from obsdiff.errors import InputError, first_line
from obsdiff.export.bundle import read_manifest
from obsdiff.files import folder_files, read_json
from obsdiff.models import size_of
from obsdiff.models.source import EMBEDDED, MANIFEST, Source, find_source, quiet_libraries
from obsdiff.runtime.pipeline import bundle_source, check_sides


@dataclass(frozen=True)
class Subject:
    """A path, its name in results, its pipeline folder, and the largest batch that it draws (None: any)."""

    path: str
    name: str
    source: Source
    max_batch: int | None
    is_bundle: bool

    @property
    def scheduler(self) -> dict[str, Any]:
        """Class and config of the scheduler, what its file leaves out included. Raises InputError."""
        file = self.source.path / "scheduler" / "scheduler_config.json"
        config = read_json(file)
        kind: Any = getattr(diffusers, str(config.get("_class_name")) if isinstance(config, dict) else "", None)
        if not hasattr(kind, "from_config"):
            raise InputError(f"{file} names no scheduler of diffusers")
        try:
            with quiet_libraries():
                full = dict(kind.from_config(config).config)
        except Exception as error:  # whatever a constructor raises for a config that it did not expect
            raise InputError(f"{file} is not of a {config['_class_name']}: {first_line(error)}") from None
        known = {key: value for key, value in full.items() if not key.startswith("_")}
        return {"class": config["_class_name"], **known}

    @property
    def embedded(self) -> bool:
        """True for the embedded model and what was made of it: its tokenizer knows the same few words."""
        return _vocabulary(self.source.path) == _vocabulary(EMBEDDED["fashion"])

    def side(self, axis: str, overrides: Mapping[str, Any]) -> int:
        """Pixels of height or width: as asked, else the folder's own default, else the model's."""
        if (asked := overrides.get(axis)) is not None:
            return int(asked)
        default = self.source.defaults.get(axis)
        return int(default or size_of(self.source.spec.sample_size, self.source.config) * self.source.vae_scale)

    def stamp(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of all files: other weights have another stamp."""
        files = folder_files(self.source.path).items()
        return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]


def look(paths: Sequence[str | Path]) -> list[Subject]:
    """The paths' subjects, named by their last component, with as many parents as tell them apart.

    Raises InputError for a path that is no model, and for one that is given twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    for k, path in enumerate(paths):
        if parts[k] in parts[:k]:
            raise InputError(f"{path} is given twice")
    found = []
    for path, own in zip(paths, parts, strict=True):
        ends = [[other[-depth:] for other in parts].count(own[-depth:]) for depth in range(1, len(own) + 1)]
        name = "/".join(own[-1 - ends.index(1) :]).lstrip("/")
        folder = Path(path)
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            found.append(Subject(str(path), name, bundle_source(folder, manifest), manifest.max_batch, True))
        else:
            found.append(Subject(str(path), name, find_source(path), None, False))
    return found


def check_comparable(candidate: Subject, reference: Subject, overrides: Mapping[str, Any]) -> None:
    """Raises InputError in one sentence when prompt, noise and settings cannot be the same for both."""
    which = f"{candidate.path} cannot be compared with {reference.path}"
    kinds = [str(one.source.index["_class_name"]) for one in (candidate, reference)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{which}: it is a {kinds[0]}, the reference a {kinds[1]}")
    for axis in ("height", "width"):
        sides = [one.side(axis, overrides) for one in (candidate, reference)]
        if sides[0] != sides[1]:
            raise InputError(f"{which}: its {axis} is {sides[0]}, the reference's {sides[1]}; give --{axis} for both")
    ours, theirs = candidate.scheduler, reference.scheduler
    if different := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
        key = different[0]
        told = f"{key} is {ours.get(key)} in one, {theirs.get(key)} in the other"
        raise InputError(f"{which}: their schedulers differ ({told}), so do their pictures")
    check_sides(candidate.path, overrides)


def _vocabulary(folder: Path) -> Any:
    file = folder / "tokenizer" / "tokenizer.json"
    found = read_json(file) if file.exists() else {}
    return found.get("model", {}).get("vocab") if isinstance(found, dict) else None
