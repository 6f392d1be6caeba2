"""Temporary: greedy text until workers.generate can do it."""

from collections.abc import Collection, Sequence

import torch

from workers.models import LanguageModel, logits_of


@torch.no_grad()
def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int]
) -> list[list[int]]:
    """Return what is written after each prompt."""
    found = []
    for prompt in prompts:
        written: list[int] = []
        while len(written) < max_new_tokens:
            token = int(logits_of(model, torch.tensor([[*prompt, *written]]))[0, -1].argmax())
            if token in stop:
                break
            written.append(token)
        found.append(written)
    return found
