"""The path of a user, walked once: prune, export and run through the command line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from cli import FEW, Result, call


@dataclass(frozen=True)
class Journey:
    """What three commands made, and what they said."""

    checkpoint: Path
    bundle: Path
    picture: Path
    prune: Result
    export: Result
    run: Result


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """The embedded model at 2:4 as a checkpoint, as a bundle, and a picture by it. To read, not to change."""
    folder = tmp_path_factory.mktemp("journey")
    out, bundle, picture = folder / "out", folder / "bundle", folder / "boot.png"
    return Journey(
        out,
        bundle,
        picture,
        call("prune", "fashion", out, "--pattern", "2:4", "--sparsity", 0.5, "--solver", "obs", *FEW),
        call("export", out, bundle, "--format", "onnx", "--json"),
        call("run", bundle, "a red ankle boot", "--out", picture, "--seed", 0),
    )
