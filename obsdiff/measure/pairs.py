"""What a measurement takes side by side: paths, each on every backend that it can run on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsdiff.errors import InputError, ObsdiffError
from obsdiff.models.source import EMBEDDED, MANIFEST, find_source
from obsdiff.progress import Progress
from obsdiff.runtime.backends import check_name
from obsdiff.runtime.generate import call_options
from obsdiff.runtime.pipeline import check_sides, load


@dataclass(frozen=True)
class Pair:
    """A path that was loaded on a backend: `asked` as the user named it, `backend` what it came to."""

    path: str | Path
    asked: str
    backend: str
    pipe: Any
    options: dict[str, Any]

    @property
    def label(self) -> dict[str, str]:
        return {"path": str(self.path), "backend": self.backend}


def backend_list(backend: str | Sequence[str]) -> list[str]:
    """The backends that were asked for, none twice. Raises InputError for one that is unknown, or for none."""
    asked = list(dict.fromkeys([backend] if isinstance(backend, str) else backend))
    if not asked:
        raise InputError("--backend: name one, or leave the option out")
    for name in asked:
        check_name(name)
    return asked


def check_paths(paths: Sequence[str | Path], sides: Mapping[str, Any]) -> None:
    """Raises InputError for a path that is wrong, before anything is loaded; a hub id is looked at when it is."""
    for path in paths:
        check_sides(path, sides)
        local = Path(path).exists() or str(path) in EMBEDDED or str(path).count("/") != 1
        if local and not (Path(path) / MANIFEST).exists():
            find_source(path)


def load_pairs(
    paths: Sequence[str | Path],
    backends: Sequence[str],
    device: str,
    overrides: Mapping[str, Any],
    progress: Progress,
    build: bool = True,
) -> list[Pair]:
    """Every path on every backend that it can run on, path by path; the progress advances by one a pair.

    What cannot run is left out with a message where the path runs on another backend; `auto` is left out without one
    where what it stands for was asked for too. Raises InputError when a path runs on none.
    """
    pairs: list[Pair] = []
    for path in paths:
        found: dict[str, Pair] = {}
        refused: list[ObsdiffError] = []
        for asked in sorted(backends, key=lambda name: name == "auto"):  # last, to know what was asked for by name
            progress.advance(1, f"loading {path}")
            try:
                pipe = load(path, asked, device, build=build, progress=progress)
            except ObsdiffError as error:
                refused.append(error)
                continue
            name = getattr(pipe, "obsdiff_backend", "torch")
            if name not in found:
                found[name] = Pair(path, asked, name, pipe, call_options(pipe, path, overrides))
        if not found:
            raise refused[0]
        for reason in refused:
            progress.message(f"left out: {reason}")
        pairs += sorted(found.values(), key=lambda pair: backends.index(pair.asked))
    return pairs
