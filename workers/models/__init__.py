"""The models: plain PyTorch, one file each. What they all can is `LanguageModel`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.models.llama import Llama
from workers.models.moonlight import Moonlight

LanguageModel = Moonlight | Llama
_MODELS = {"moonlight": Moonlight, "llama": Llama}


def build_empty(config: ModelConfig) -> LanguageModel:
    """Make the modules on torch's default device, with weights as they come."""
    return _MODELS[config.name](config)


def logits_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return the logits of each next token, `[batch, time, vocabulary]`; training never has them all at once."""
    return F.linear(model(tokens), model.head)


def build(config: ModelConfig, initialize: bool = True) -> LanguageModel:
    """Make the model with weights drawn from torch's current random state, or, to be filled later, with zeros."""
    if not initialize:
        with torch.device("meta"):
            model = build_empty(config)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            nn.init.zeros_(tensor)
        return model
    model = build_empty(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # Norm gains start at one.
            nn.init.normal_(parameter, std=config.init_std)
    return model
