"""Options of prunes that take about a second."""

from typing import Any

QUICK: dict[str, Any] = {
    "num_prompts": 4,
    "steps": 2,
    "batch_size": 2,
    "packages": 2,
    "device": "cpu",
    "solver": "obs",
}
