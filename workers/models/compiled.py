"""Layers as torch.compile makes them: fewer passes over memory, the same arithmetic but for rounding.

Each layer is compiled by itself and in place, so that parameters keep their names and layers that are alike share what
was made for one. Embedding, head and loss stay as they are.

Invariant: only training is compiled, which has one shape. Validation and samples run as written: a sample has another
length at every token, and each would be compiled anew. And a layer is one graph, or an error: where one breaks, torch
takes the newest of the beginnings that fit, so that a step's rounding would depend on which steps were made before, and
a resumed run would not do what the whole one did.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from workers.models.language_model import LanguageModel

VARIANTS = 32
"""Of a layer's code at most: kinds of layers, each watched or not, recomputed or not, the first with a mask or not."""


def compile_layers(model: LanguageModel) -> None:
    """Have every layer compiled when it first trains, for the shapes of that call.

    That takes a C++ compiler on a CPU, and a minute; torch keeps what it has made on this machine's disk.
    """
    dynamo_config.recompile_limit = max(VARIANTS, dynamo_config.recompile_limit)
    for block in model.blocks:
        block.forward = _in_training(block, block.forward)


def _in_training(layer: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)

    def forward(*inputs: object) -> Tensor:
        return (compiled if layer.training else plain)(*inputs)

    return forward
