"""What is to be known of a model to read and write it as Hugging Face's libraries do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jobs.architectures.keys import Keys
from optim.checks import Check
from workers.config import ModelConfig


class Architecture(ABC):
    """An architecture of transformers that is a model of ours; `model` is always of the class that `read` returns."""

    model_type: ClassVar[str]
    """As `config.json` has it."""
    class_name: ClassVar[str]
    """Of transformers' causal language model."""
    defaults: ClassVar[Mapping[str, Any]]
    """transformers' values of what `config.json` leaves out."""

    @abstractmethod
    def read(self, keys: Keys) -> ModelConfig:
        """Return our settings; every key that may change a logit is asked for.

        Raises:
            ConfigError: a key has a value with which we do not compute.
            ConfigProblems: these are no sizes of ours.
        """

    @abstractmethod
    def write(self, model: Any) -> dict[str, Any]:
        """Return the keys of `config.json` that say what the model computes."""

    @abstractmethod
    def loads(self, model: Any) -> list[Check]:
        """Return what has to hold for transformers to load and run it."""

    def empty(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors without elements that only transformers' model has; here none."""
        return {}

    @abstractmethod
    def rotary(self, model: Any) -> tuple[int, float]:
        """Return the width per head that rotary positions turn, and their base; 0 where there are none."""
