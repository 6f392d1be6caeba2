"""A result for programs: one JSON object, on the last line of stdout."""

import json
import sys


def tell(result: object) -> None:
    """Write a result as one line of JSON, at once."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
