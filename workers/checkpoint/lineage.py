"""What a checkpoint comes from: the code that trained it, and the checkpoints with whose weights its run began.

The data and the tokenizer are told by the manifest's identity. A manifest carries the whole chain, so it tells of
ancestors that are gone by now.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from workers.common.typed import read_fields

if TYPE_CHECKING:
    from workers.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestor:
    """A checkpoint whose weights another run has begun with."""

    run_id: str
    url: str
    """Of its run's folder, as it was reached then."""
    step: int
    tokens: int
    sha256: str
    """Of its manifest, which has the hashes of all else; empty where it was not known."""
    stage: str = ""
    """As of `Lineage`."""
    optimizer: str = ""
    data: Any = ""
    """SHA-256 of the data; by the sources' names where they have some."""
    tokenizer: str = ""
    """SHA-256 of the tokenizer's file; empty for bytes, or where an import has none."""
    imported: str = ""
    """Name of the folder that it was imported from; empty of what was trained."""
    code: dict[str, str] = field(default_factory=dict)
    """As of `Lineage`; empty where an older version has written it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """What a checkpoint comes from."""

    code: dict[str, str]
    """Of the attempt that has written it: `training`, one hash over the files that decide what is trained; `commit`,
    empty where there was no checkout; `raymuon`, the version."""
    stage: str = ""
    """Of the run, in which its step was trained; empty where the run is one stage."""
    ancestors: tuple[Ancestor, ...] = ()
    """What the run began with, what that run began with, and so on; empty for random weights, and for an import."""
    complete: bool = True
    """False where the chain ends because an older version has not put down what was before."""

    def encode(self) -> dict[str, Any]:
        """Return it in JSON's types."""
        return {**asdict(self), "ancestors": [asdict(one) for one in self.ancestors]}

    @staticmethod
    def read(fields: Mapping[str, Any]) -> "Lineage":
        """Read what `encode` has made.

        Raises:
            ValueError: it is something else.
        """
        own = read_fields(_Flat, fields)
        ancestors = tuple(read_fields(Ancestor, one) for one in own.ancestors)
        return Lineage(code=own.code, stage=own.stage, ancestors=ancestors, complete=own.complete)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flat:
    code: dict[str, str]
    stage: str = ""
    ancestors: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True


def descend(code: dict[str, str], parent: "Manifest | None" = None, url: str = "") -> Lineage:
    """Return the lineage of what begins with another run's checkpoint, or with random or imported weights.

    Args:
        code: of what begins.
        parent: the checkpoint.
        url: of its run's folder.
    """
    if parent is None:
        return Lineage(code=code)
    before = parent.lineage
    identity = parent.identity
    ancestor = Ancestor(
        run_id=parent.run_id,
        url=url,
        step=parent.step,
        tokens=parent.counters["tokens"],
        sha256=parent.sha256,
        stage=before.stage if before else "",
        optimizer=identity.get("optim.name", ""),
        data=identity.get("data", ""),
        tokenizer=identity.get("data.tokenizer", ""),
        imported=identity.get("imported", ""),
        code=before.code if before else {},
    )
    complete = before.complete if before else bool(ancestor.imported)
    return Lineage(code=code, ancestors=(ancestor, *(before.ancestors if before else ())), complete=complete)


def go_on(code: dict[str, str], restored: "Manifest") -> Lineage:
    """Return the lineage of what goes on with a checkpoint of its own run."""
    before = restored.lineage
    return Lineage(
        code=code, ancestors=before.ancestors if before else (), complete=before.complete if before else False
    )
