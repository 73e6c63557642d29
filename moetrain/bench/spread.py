"""How measurements of a benchmark are summarised and shown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def spread_text(values: Mapping[str, float], *, digits: int) -> str:
    """Return a spread as text for a table."""
    return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f} - {values['max']:,.{digits}f})"


def contestant_text(row: Mapping[str, Any]) -> str:
    """Return the name of a contestant for a table, with the setting that it chose."""
    return f"{row['name']} ({row['setting']})" if row["setting"] else row["name"]
