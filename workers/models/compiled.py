"""Layers as torch.compile makes them: fewer passes over memory, the same arithmetic but for rounding.

Each layer is compiled by itself and in place, so that parameters keep their names and layers that are alike share what
was made for one. Embedding, head and loss stay as they are.

Invariant: what is compiled follows from the settings alone, and is made before the first step.
- A layer is one graph, or an error. Where a graph breaks, torch takes the newest of the beginnings that fit: a step's
  rounding would depend on the steps before it, and a resumed run would not do what the whole one did.
- Only training is compiled, which has one shape: a sample has another length at every token. Attention that is watched
  is compiled where every step watches it, for QK-Clip, and else runs as written in the few steps that are measured.
- Compiling takes longer than a step may: a worker that did it between two steps would be taken for hung.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from workers.models.attention import CausalAttention, take_logits, watch
from workers.models.language_model import LanguageModel

VARIANTS = 32
"""Of a layer's code at most: kinds of layers, each watched or not, recomputed or not, the first with a mask or not."""


def compile_layers(model: LanguageModel, watched: bool = False) -> None:
    """Have every layer compiled for training, at its first call.

    Args:
        model: in which the layers are replaced in place.
        watched: whether training watches attention in every step; steps that do otherwise run as written.
    """
    from torch._dynamo import config as dynamo_config  # Torch's compiler takes seconds to import.

    dynamo_config.recompile_limit = max(VARIANTS, dynamo_config.recompile_limit)
    for block in model.blocks:
        block.forward = _in_training(block, block.forward, watched)


def compile_ahead(model: LanguageModel, micro_batch: int, seq_len: int, documents: bool, watched: bool) -> None:
    """Make what a training step will need, and leave nothing of it in the model.

    That takes a C++ compiler on a CPU, and a minute; torch keeps what it has made on this machine's disk.

    Args:
        model: with its layers compiled, on its device and in its dtype.
        micro_batch: sequences of a forward pass.
        seq_len: tokens of each.
        documents: whether training has a mask of them.
        watched: as of `compile_layers`.
    """
    place = torch.arange(seq_len, device=model.head.device)
    tokens = (place % len(model.head)).expand(micro_batch, -1)
    ends = (place >= seq_len // 2).int().expand(micro_batch, -1) if documents else None
    watch(model, watched)
    hidden = model.train()(tokens, ends)
    # Not `backward`: what is hung on the gradients, an engine's reduction, is left alone.
    torch.autograd.grad(hidden.float().square().mean(), list(model.parameters()), allow_unused=True)
    watch(model, False)
    take_logits(model)
    model.clear_expert_load()


def _in_training(layer: nn.Module, plain: Callable[..., Tensor], watched: bool) -> Callable[..., Tensor]:
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    attention = [module for module in layer.modules() if isinstance(module, CausalAttention)]

    def forward(*inputs: object) -> Tensor:
        known = layer.training and all(module.watched == watched for module in attention)
        return (compiled if known else plain)(*inputs)

    return forward
