"""When requests arrive that wait for nobody."""

import random
from itertools import accumulate


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds at which a Poisson process of that rate brings its first `count` requests."""
    draw = random.Random(seed)  # noqa: S311
    return list(accumulate(draw.expovariate(rate) for _ in range(count)))
