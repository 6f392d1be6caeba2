"""What a question has to know of its trials' configs before they run: their sizes and lengths."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jobs.load import load_settings, read
from jobs.study.question import Settings, Study
from orchestrator.config import RunConfig


def config_of(study: Study, settings: Settings) -> RunConfig:
    """Return the config of a trial with these settings.

    Raises:
        ConfigError: with every problem that was found.
    """
    return _config(study.base, json.dumps([dict(study.settings), dict(settings)], default=str), study.name)


@lru_cache(maxsize=1024)
def _config(base: str, layers: str, name: str) -> RunConfig:
    settings: list[Mapping[str, Any]] = json.loads(layers)
    return load_settings(read(base), settings, f"{base} of study {name}")
