"""What a worker and a keeper, or two keepers, say to each other, and its form on the wire.

Every request has exactly one answer. One that is not understood, or comes out of turn, is answered by `Refused`, which
names it: nobody waits for an answer that will not come.
"""

import json
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from workers.common.typed import read_fields
from workers.common.wire import Connection
from workers.snapshots.region import HALVES


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Any message. Numbers are not negative."""

    op: ClassVar[str]

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and not 0 <= value < (HALVES if name == "half" else 1 << 62):
                raise ValueError(f"{name}: {value} is out of range")


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Message):
    """Make a region for a rank, or find the one that it has; what follows is of it. Answer: `Opened`."""

    op = "open"
    generation: int
    rank: int
    world_size: int
    shard: int
    replicated: int
    """Bytes, as in `RegionSize`."""
    fragments: tuple[tuple[str, str, int, int, int], ...]
    """Kind, name, start, length and offset in the region of each."""
    shapes: dict[str, list[int]]
    """Of all tensors, for the checkpoints' manifests."""
    buddy: tuple[str, int] | None
    """Host and port of the keeper that gets a copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Message):
    """Copy the agreed half to the buddy. Answer: `Done`, when it is there or there is no buddy."""

    op = "push"
    half: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Message):
    """Can another snapshot be saved? Answer: `Idle`."""

    op = "ask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(Message):
    """Write the agreed half to storage. Answer: `Done`, when the half may be written over."""

    op = "save"
    half: int
    run_url: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep(Message):
    """Keep another keeper's snapshot, whose content follows. Answer: `Done`."""

    op = "keep"
    generation: int
    rank: int
    world_size: int
    shard: int
    replicated: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Message):
    """Send `count` values of a region from `offset` on. Answer: `Content`."""

    op = "read"
    path: str
    half: int
    step: int
    offset: int
    count: int


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Message):
    """The region is found at `path` on this node."""

    op = "opened"
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """It is done."""

    op = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle(Message):
    """Whether another snapshot can be saved."""

    op = "idle"
    idle: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Content(Message):
    """What was asked for follows."""

    op = "content"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """It cannot be done, or was not understood."""

    op = "refused"
    error: str


KINDS: dict[str, type[Message]] = {
    kind.op: kind for kind in (Open, Push, Ask, Save, Keep, Read, Opened, Done, Idle, Content, Refused)
}
A = TypeVar("A", bound=Message)


class RefusedError(ConnectionError):
    """The other end refuses, or answers what nobody has asked for."""


def encode(message: Message) -> bytes:
    """Return a message's form on the wire: a JSON object."""
    return json.dumps({"op": message.op, **{name: getattr(message, name) for name in message.__slots__}}).encode()


def decode(head: bytes) -> Message:
    """Return the message of that form.

    Raises:
        ValueError: there is no such message, or a field of it is wrong.
    """
    try:
        values = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    op = values.get("op") if isinstance(values, dict) else None
    if not isinstance(op, str) or op not in KINDS:
        raise ValueError(f"unknown message {op!r:.80}; known are {', '.join(KINDS)}")
    try:
        return read_fields(KINDS[op], values)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def request(connection: Connection, message: Message, expected: type[A], payload: memoryview | bytes = b"") -> A:
    """Send a message and return its answer, one without bytes.

    Raises:
        OSError: as `answer`.
    """
    connection.send(encode(message), payload)
    return answer(connection, expected)[0]


def answer(connection: Connection, expected: type[A]) -> tuple[A, int]:
    """Return the next answer and how many bytes come behind it.

    Raises:
        RefusedError: it is another one.
        OSError: the other end is gone.
    """
    head, size = connection.receive()
    try:
        message = decode(head)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if not isinstance(message, expected):
        raise RefusedError(message.error if isinstance(message, Refused) else f"{message.op}, not {expected.op}")
    return message, size
