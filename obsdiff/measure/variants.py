"""What belongs to one variant: checkpoints, bundles and results are told apart, and put together, by their paths."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from obsdiff.checkpoint import CheckpointInfo
from obsdiff.errors import InputError
from obsdiff.export.bundle import Manifest
from obsdiff.export.receipt import Receipt
from obsdiff.measure.results import Bench, Eval, printable


@dataclass
class Found:
    """What was given, each by its path as it was written."""

    checkpoints: dict[str, CheckpointInfo] = field(default_factory=dict)
    bundles: dict[str, Manifest] = field(default_factory=dict)
    receipts: dict[str, Receipt | None] = field(default_factory=dict)
    benches: dict[str, Bench] = field(default_factory=dict)
    evals: dict[str, Eval] = field(default_factory=dict)


def name_variants(found: Found) -> dict[str, str]:
    """The variant's name for every path that was given or that a result names.

    It is the path's last component; parent/name where one result, two checkpoints or two bundles have different paths
    with the same last component, or a bundle was not made of the checkpoint of its name. A bundle takes the name of the
    checkpoint whose recipe it holds, a dense one the name of the model that it was made of, if it is the only one.
    Raises InputError when two paths stay alike.
    """
    listed = [
        *([one.reference.path, *(drawn.path for drawn in one.results)] for one in found.evals.values()),
        *([row.path for row in bench.results] for bench in found.benches.values()),
    ]
    paths = list(dict.fromkeys(path for group in (*listed, found.checkpoints, found.bundles) for path in group))
    apart: list[list[str]] = [list(found.checkpoints), list(found.bundles), *listed]
    apart += [
        [a, b] for a, info in found.checkpoints.items() for b, m in found.bundles.items() if not _made_of(m, info)
    ]
    shared = {name for group in apart for name in _doubles(group, 1)}
    names = {path: last_parts(path, 2 if last_parts(path, 1) in shared else 1) for path in paths}
    for group in apart:
        if double := next(iter(_doubles(group, 2) & {names[path] for path in group}), None):
            raise InputError(f"two different paths end in {double}: rename one, or leave it out")
    claims: dict[str, list[str]] = defaultdict(list)
    known = {names[path] for path in (*found.checkpoints, *(path for group in listed for path in group))}
    for path, manifest in found.bundles.items():
        if manifest.recipe is None:
            origin = last_parts(manifest.base.get("name", ""), 1)
            origins = [origin] if origin in known else []
        else:
            origins = [names[other] for other, info in found.checkpoints.items() if _made_of(manifest, info)]
        if names[path] not in origins and len(origins) == 1:
            claims[origins[0]].append(names[path])
    bundles = {names[path] for path in found.bundles}
    renamed = {own[0]: origin for origin, own in claims.items() if len(own) == 1 and origin not in bundles}
    return {path: printable(renamed.get(name, name)) for path, name in names.items()}


def _made_of(manifest: Manifest, info: CheckpointInfo) -> bool:
    return manifest.recipe == info.recipe and manifest.base.get("sha256") == info.base["sha256"]


def last_parts(path: str, count: int) -> str:
    """The last components of a path, of a folder like `.` those of where it is."""
    pure = PurePath(os.path.normpath(path))
    parts = (pure if pure.name not in ("", "..") else Path(path).resolve()).parts
    return "/".join(part for part in parts[-count:] if part != os.sep) or path


def _doubles(paths: Iterable[str], count: int) -> set[str]:
    """Last components that different paths have in common."""
    different = {os.path.normpath(path) for path in paths}
    ends = [last_parts(path, count) for path in different]
    return {end for end in ends if ends.count(end) > 1}


def find_reference(found: Found, names: Mapping[str, str]) -> str | None:
    """What the others are compared with: eval's reference, the first path of a bench, or a dense bundle."""
    paths = [one.reference.path for one in found.evals.values()]
    paths += [bench.results[0].path for bench in found.benches.values()]
    paths += [path for path, manifest in found.bundles.items() if manifest.recipe is None]
    return names[paths[0]] if paths else None
