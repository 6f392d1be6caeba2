"""Text from a trained byte-level model."""

from collections.abc import Callable

import torch

from workers.data.tokenizer import BYTES
from workers.models import LanguageModel, logits_of


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: str,
    num_bytes: int,
    context: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
    temperature: float = 0.7,
) -> str:
    """Return the prompt and up to `num_bytes` bytes after it; a document's end (a zero byte) stops it.

    Args:
        model: on any device.
        prompt: text to go on from.
        num_bytes: to generate.
        context: tokens that the model looks back on.
        seed: of the sampling.
        progress: called before each byte.
        temperature: of the softmax.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    tokens = list(prompt.encode())
    model.eval()
    for _ in range(num_bytes):
        progress()
        logits = logits_of(model, torch.tensor([tokens[-context:]], device=device))[0, -1].float().cpu()
        token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random))
        if token == BYTES.end:
            break
        tokens.append(token)
    model.train()
    return BYTES.decode(tokens)
