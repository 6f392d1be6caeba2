"""Text from a trained model."""

from collections.abc import Callable

import torch

from workers.data.tokenizer import Tokenizer
from workers.models import LanguageModel, logits_of


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    size: int,
    context: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
    temperature: float = 0.7,
) -> str:
    """Return the prompt and what the model writes after it, until it ends the document.

    Args:
        model: on any device.
        tokenizer: that it was trained with.
        prompt: text to go on from.
        size: so many letters are written, or as many tokens.
        context: tokens that the model looks back on.
        seed: of the sampling.
        progress: called before each token.
        temperature: of the softmax.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    tokens, written = begin + tokenizer.encode([prompt.encode()])[0].tolist(), []
    model.eval()
    while len(written) < size and len(tokenizer.decode(written)) < size:
        progress()
        looked_at = torch.tensor([(tokens + written)[-context:]], device=device)
        logits = logits_of(model, looked_at)[0, -1].float().cpu()
        token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random))
        if token == tokenizer.end:
            break
        written.append(token)
    model.train()
    return tokenizer.decode(tokens + written)
