"""What a question has to know of its trials' configs before they run: their sizes and lengths."""

import json
from dataclasses import dataclass, field
from functools import lru_cache

from jobs.study import file
from jobs.study.question import Settings, Study, Trial
from orchestrator.config import RunConfig


@dataclass(frozen=True)
class _Asked:
    layers: str
    """Base and settings as JSON: a question asks for the same ones again and again."""
    study: Study = field(compare=False)
    settings: Settings = field(compare=False)


def config_of(study: Study, settings: Settings) -> RunConfig:
    """Return the config of a trial with these settings.

    Raises:
        ConfigError: with every problem that was found.
    """
    layers = json.dumps([study.base, dict(study.settings), dict(settings)], default=str)
    return _config(_Asked(layers, study, settings))


@lru_cache(maxsize=1024)
def _config(asked: _Asked) -> RunConfig:
    return file.config_of(asked.study, Trial(name="any", settings=asked.settings, coordinates={}))
