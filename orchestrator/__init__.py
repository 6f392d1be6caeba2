"""The Ray driver: worker group, run log, tracking, and the policies between them."""

import os

# Ray reads these when it is imported, by whichever of our modules comes first.
# It prints paragraphs on stdout about each worker and node that dies; the driver tells of them in a line.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed|has been marked dead|retries remaining")
# Under `uv run` Ray would pack the current folder, and make each worker an environment of its own.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
