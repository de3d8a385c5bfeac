"""One server for all tests that leave it as it was: two models, batches of 4, a queue of 12."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server import Server


@pytest.fixture(scope="session")
def server(one_block_bundle: Path, graphless: Path) -> Iterator[Server]:
    started = Server(one_block_bundle, f"plain={graphless}", "--max-batch-size", 4, "--max-queue", 12)
    try:
        yield started.ready()
    finally:
        started.kill()
