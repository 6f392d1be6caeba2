"""How likely a model takes a text to be: the log-likelihood of continuations after their contexts.

Sequences are batched by length. The head is asked for the positions of continuations alone, some rows at a time, in
fp32 whatever the weights are in: in bf16 close choices are equal.

Invariant: what comes out depends on a pair alone, but for rounding, and not on what it is batched with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.cross_entropy import ROWS
from workers.models.language_model import LanguageModel

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""
Score = tuple[float, bool]
"""The log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest at its place."""


@torch.no_grad()
def score(
    model: LanguageModel,
    pairs: Sequence[Pair],
    seq_len: int,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Score]:
    """Return the score of each pair.

    Pairs of the same input, as choices of one token after the same context are, cost as much as one.

    Args:
        model: ready to be asked, on any device.
        pairs: neither part empty, no continuation longer than `seq_len`.
        seq_len: tokens that the model looks at; what is longer loses its beginning.
        batch_tokens: that go through the model at once, padding included; at least one sequence does.
        progress: called after each batch with the number of pairs that are scored.

    Raises:
        ValueError: a part is empty, or a continuation too long.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= seq_len:
            raise ValueError(f"pair {number}: {len(context)} and {len(continuation)} tokens; 1 to {seq_len} are scored")
        alike.setdefault((*context, *continuation)[-seq_len - 1 : -1], []).append(number)
    found: dict[int, Score] = {}
    head = model.head.float()
    for batch in _batches(alike, batch_tokens):
        hidden = model(_padded(batch, head.device))
        asked = [(row, number) for row, inputs in enumerate(batch) for number in alike[inputs]]
        states, targets = [], list[int]()
        for row, number in asked:
            continuation, end = pairs[number][1], len(batch[row])
            states.append(hidden[row, end - len(continuation) : end])
            targets.extend(continuation)
        numbers = [number for _, number in asked]
        lengths = [len(pairs[number][1]) for number in numbers]
        found |= zip(numbers, _scores(torch.cat(states), head, targets, lengths), strict=True)
        progress(len(found))
    return [found[number] for number in range(len(pairs))]


def _batches(inputs: Mapping[tuple[int, ...], object], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the inputs, the longest first: what has no room in memory shows at once."""
    batch: list[tuple[int, ...]] = []
    for one in sorted(inputs, key=lambda ids: (-len(ids), ids)):
        if batch and len(batch[0]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _padded(batch: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return sequences as int64 `[batch, longest]`; no position sees the zeros after its sequence's end."""
    width = max(map(len, batch))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device)


def _scores(states: Tensor, head: Tensor, targets: Sequence[int], lengths: Sequence[int]) -> Iterator[Score]:
    """Score continuations whose hidden states `[tokens, hidden]` and targets follow one another, of these lengths."""
    wanted = torch.tensor(targets, device=states.device)
    parts = zip(states.split(ROWS[states.device.type]), wanted.split(ROWS[states.device.type]), strict=True)
    likelihoods, greedy = zip(*(_of_rows(rows, head, ids) for rows, ids in parts), strict=True)
    per_token, likeliest = torch.cat(likelihoods).double().cpu(), torch.cat(greedy).cpu()
    for mine, best in zip(per_token.split(list(lengths)), likeliest.split(list(lengths)), strict=True):
        yield mine.sum().item(), bool(best.all())


def _of_rows(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(states.float(), head)
    found = F.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return found, logits.argmax(-1) == targets
