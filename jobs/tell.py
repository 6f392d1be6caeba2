"""A result for programs: one JSON object, on the last line of stdout."""

import json
import math
import sys
from typing import Any

from jobs.output import check_kept


def tell(result: object) -> None:
    """Write a result as one line of JSON, at once.

    Raises:
        StorageError: the disk of the file that takes it is full.
    """
    sys.stdout.write(json_text(result) + "\n")
    sys.stdout.flush()
    check_kept()


def json_text(result: object, indent: int | None = None) -> str:
    """Return a result as JSON, which has no NaN and no infinity: such a number is null."""
    return json.dumps(_plain(result), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
    return value
