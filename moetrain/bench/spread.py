"""How measurements of a benchmark are summarised."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
