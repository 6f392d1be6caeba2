"""The models: plain PyTorch, one file each. What they all can is `LanguageModel`, which there are says `MODELS`."""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.config import OptimConfig
from optim.mup import STANDARD
from workers.config import MODELS, ModelConfig
from workers.models.language_model import LanguageModel


def build_empty(config: ModelConfig) -> LanguageModel:
    """Make the modules on torch's default device, with weights as they come."""
    module, _, name = MODELS[type(config)].rpartition(".")
    return getattr(importlib.import_module(module), name)(config)


def build(config: ModelConfig, initialize: bool = True, optim: OptimConfig | None = None) -> LanguageModel:
    """Make the model with weights drawn from torch's current random state, or, to be filled later, with zeros.

    Args:
        config: of the model.
        initialize: whether to draw them.
        optim: whose width rule scales them; None: none.
    """
    if not initialize:
        with torch.device("meta"):
            model = build_empty(config)
        # What `to_empty` does, which makes torch import its symbols, half a second's worth, while all wait.
        return model._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    model = build_empty(config)
    model.initialize(config.init_std, model.parametrization(optim) if optim else STANDARD)
    return model


def logits_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the logits of each next token, `[batch, time, vocabulary]`; training never asks for them."""
    return F.linear(model(tokens), model.head)
