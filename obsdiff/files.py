"""Files that are written whole or not at all, hashed, and packed masks."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from obsdiff.errors import InputError, ObsdiffError

CHUNK = 1 << 20


def cache_folder(*parts: str) -> Path:
    """Where this user's measurements and engines are kept: OBSDIFF_CACHE, or obsdiff in the user's cache folder."""
    folder = os.environ.get("OBSDIFF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "obsdiff"
    return Path(folder).expanduser().joinpath(*parts)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the body ends well, and vanishes when it does not."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.chmod(0o644)  # safetensors writes 600, which another user's server cannot read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:  # a full disk says that it is full, and not where
        if error.errno:
            error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The parsed file. Raises InputError that names it when it is missing, truncated or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes torch tensors as safetensors. Raises ObsdiffError when the disk is full or refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as part:
        try:
            save_file(dict(tensors), part, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise ObsdiffError(f"{path} could not be written: {error}") from None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_files(folder: Path) -> dict[str, Path]:
    """Every file below the folder by its relative POSIX path, sorted, hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: relative[name] for name in sorted(relative) if not any(part.startswith(".") for part in name.split("/"))
    }


def folder_hash(folder: Path) -> str:
    """SHA-256 over the relative paths and SHA-256 of all files in the folder."""
    digest = hashlib.sha256()
    for name, path in folder_files(folder).items():
        digest.update(f"{name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def copy_files(source: Path, target: Path, skip: tuple[str, ...] = ()) -> None:
    """Copies the folder's files but those below the top-level names in `skip`."""
    for name, path in folder_files(source).items():
        if name.split("/")[0] not in skip:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, target / name)
            except OSError as error:  # it names the file that was read first, but a full disk is the other's
                error.filename, error.filename2 = error.filename2 or error.filename, None
                raise
