"""Plain data as JSON knows it: mappings with text keys, lists, and no number that is none."""

import math
from collections.abc import Mapping
from typing import Any


def jsonable(value: Any) -> Any:
    """Return nested plain data with tuples as lists, and with None in place of infinity and NaN."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
