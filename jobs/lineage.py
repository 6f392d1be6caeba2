"""What a checkpoint comes from, in words: for `raymuon checkpoints show`, and for the cards of exports."""

from workers.checkpoint.lineage import Ancestor, Lineage

SHORT = 12
"""Digits of a commit that tell it from the others."""


def told(lineage: Lineage | None, places: bool) -> dict[str, str]:
    """Return rows for people, the nearest ancestor first.

    Args:
        lineage: of a manifest; None where an older version has written it.
        places: with the folders that the ancestors were in, which are of whoever has trained.
    """
    if lineage is None:
        return {"comes from": "not recorded: an older raymuon has written it"}
    rows = {"stage": lineage.stage} if lineage.stage else {}
    rows["code"] = code(lineage.code)
    for number, ancestor in enumerate(lineage.ancestors):
        rows[_nth(number)] = _ancestor(ancestor, places)
    if not lineage.complete:
        rows[_nth(len(lineage.ancestors))] = "not recorded: an older raymuon has written it"
    return rows


def code(known: dict[str, str]) -> str:
    """Return which code that is; empty where nothing is known of it."""
    commit, dirty, _ = known.get("commit", "").partition("-")
    parts = {
        "raymuon": known.get("raymuon", ""),
        "commit": f"{commit[:SHORT]}{dirty and ' with changes'}" if commit else "",
        "hash of the training code": known.get("training", ""),
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value)


def name_of(ancestor: Ancestor) -> str:
    """Return what it is called."""
    if ancestor.imported:
        return f"the import of {ancestor.imported}"
    return f"{ancestor.run_id} at step {ancestor.step}"


def _nth(number: int) -> str:
    return ("began with", "and that with")[number] if number < 2 else f"and that with ({number + 1})"


def _ancestor(ancestor: Ancestor, places: bool) -> str:
    parts = [
        name_of(ancestor),
        f"stage {ancestor.stage}" if ancestor.stage else "",
        ancestor.optimizer,
        f"{ancestor.tokens:,} tokens" if ancestor.tokens else "",
        f"SHA-256 of the manifest {ancestor.sha256}" if ancestor.sha256 else "",
        code(ancestor.code),
        f"in {ancestor.url}" if places else "",
    ]
    return ", ".join(part for part in parts if part)
