"""The new weights' way to every rank, under the forward pass that needs them.

DeepSpeed gathers all weights at the end of its step, and everybody waits. Here they leave for the other ranks in
windows, a few ranks' partitions after the others', which lie in the order of the layers; and each layer waits for its
own before it runs. They travel in a process group of their own: what else is agreed on meanwhile does not queue behind
them.

Not run on GPUs. On CPUs gloo's threads would take the time from the products, so there it is for tests.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from workers.models import LanguageModel

WINDOWS = 8
"""Of the largest group: each has to be long beside a collective's latency."""


class Ungathered(list[Tensor]):
    """The flat weights of DeepSpeed's groups, which can be looked up, and of which its step finds none to gather."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


class Gather:
    """Sends this rank's part of the weights, and waits for the others'.

    Args:
        zero: DeepSpeed's wrapper, whose step gathers nothing from here on.
        model: the module, laid out by it.
        windows: in how many parts the largest group travels.
    """

    def __init__(self, zero: Any, model: LanguageModel, windows: int = WINDOWS) -> None:
        self.flats: list[Tensor] = list(zero.bit16_groups_flat)
        zero.bit16_groups_flat = Ungathered(self.flats)
        self.group: Any = dist.new_group()
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        largest = max(range(len(self.flats)), key=lambda index: self.flats[index].numel())
        each = -(-self.ranks // min(windows, self.ranks))
        # Embedding, head and norms first: the first is needed at once, and all of them are small.
        self.windows = [(index, range(self.ranks)) for index in range(len(self.flats)) if index != largest]
        firsts = range(0, self.ranks, each)
        self.windows += [(largest, range(first, min(first + each, self.ranks))) for first in firsts]
        """The group and the ranks whose partitions travel."""
        self._works: dict[int, list[Any]] = {}
        in_blocks = {parameter for block in model.blocks for parameter in block.parameters()}
        self._wait_before(model, (parameter for parameter in model.parameters() if parameter not in in_blocks))
        for block in model.blocks:
            self._wait_before(block, block.parameters())

    def start(self) -> None:
        """Let the weights leave, as they are after a step; all ranks call it."""
        self.finish()
        for number, (index, ranks) in enumerate(self.windows):
            parts = self.flats[index].chunk(self.ranks)
            self._works[number] = list(self._send(parts, ranks))

    def finish(self) -> None:
        """Wait for all of them."""
        self._wait(list(self._works))

    def _send(self, parts: tuple[Tensor, ...], ranks: range) -> Iterator[Any]:
        if self.flats[0].is_cuda:
            # Of the others two elements, which are what they are: NCCL has no gathering from some ranks alone.
            least = [part if rank in ranks else part[:2] for rank, part in enumerate(parts)]
            yield dist.all_gather(least, least[self.rank], self.group, async_op=True)
        else:
            for rank in ranks:
                yield dist.broadcast(parts[rank], rank, self.group, async_op=True)

    def _wait_before(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        needed = sorted({number for parameter in parameters for number in self._windows_of(parameter)})
        module.register_forward_pre_hook(lambda *_: self._wait(needed))

    def _windows_of(self, parameter: nn.Parameter) -> Iterator[int]:
        nbytes, begin = parameter.nbytes, parameter.data_ptr()
        for number, (index, ranks) in enumerate(self.windows):
            flat = self.flats[index]
            partition = flat.nbytes // self.ranks
            first = flat.data_ptr() + ranks.start * partition
            if begin < first + len(ranks) * partition and begin + nbytes > first:
                yield number

    def _wait(self, numbers: list[int]) -> None:
        for number in numbers:
            for work in self._works.pop(number, ()):
                work.wait()
