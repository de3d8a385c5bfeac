"""What a long stage reports while it works. The stages call it; the command line draws it."""

import contextlib
from collections.abc import Iterator


class Progress:
    """Silent by default: a subclass shows it. `total` and `advance` count work of roughly equal cost."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, count: int = 1, note: str = "") -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self) -> None: ...

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator["Progress"]:
        self.start(title, total)
        try:
            yield self
        finally:
            self.finish()
