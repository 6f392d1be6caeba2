"""What there is to prepare: a source, the groups that its files make, and how their documents become tokens."""

from dataclasses import dataclass
from pathlib import Path

from workers.common.storage import Store
from workers.data.chat import ChatTemplate
from workers.data.corpus import Corpus, has_shards, load
from workers.data.pieces import Piece
from workers.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """How the documents of a source become tokens."""

    field: str
    held_out: str
    held_out_fraction: float
    max_bad_documents: int
    key: str
    """Of the config, for messages."""
    s3_endpoint: str = ""
    template: ChatTemplate | None = None
    """Writes the documents, where they are conversations."""


@dataclass(frozen=True)
class Group:
    """Neighbouring pieces of a source that make one shard for each split."""

    number: int
    first: int
    """Number of its first piece in the source."""
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Of its note."""
        return f"groups/{self.number:05d}.json"

    @property
    def size(self) -> int:
        """In bytes of input."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Work:
    """A source that is to be prepared, or is."""

    name: str
    store: Store
    """Its own folder."""
    recipe: Recipe
    tokenizer: Tokenizer
    groups: tuple[Group, ...]
    after: tuple[Store, ...] = ()
    """Sources whose documents are left out of this one, and this one, where duplicates are."""

    def prepared(self) -> Corpus | None:
        """Return it where it is there whole."""
        if not self.store.exists("index.json") or not has_shards(corpus := load(self.store, self.name)):
            return None
        return corpus

    def missing(self) -> list[Group]:
        """Return the groups that nobody has finished yet."""
        there = {*self.store.names("groups")}
        return [group for group in self.groups if Path(group.name).name not in there]
