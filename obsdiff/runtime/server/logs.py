"""Logs as JSON, one object a line on standard error."""

import json
import logging
import sys
from datetime import UTC, datetime

from obsdiff.progress import Progress

LEVELS = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and whatever a call gives as extra={"data": {...}}."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class LoggedProgress(Progress):
    """What takes its time while a model loads, such as the build of an engine, in the log."""

    def start(self, title: str, total: int) -> None:
        self.message(title)

    def message(self, text: str) -> None:
        logging.getLogger("obsdiff.worker").info(text)


def log_json(level: int = logging.INFO) -> None:
    """Sends every logger of this process, and its warnings, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in ("py.warnings", "asyncio", "httpx"):
        logging.getLogger(name).setLevel(max(level, logging.ERROR))
