"""Which code a run is trained with: what a replay compares with its own.

The files' hashes say what was really there, in a container or a job's working directory as in a checkout; the commit is
for people. `raymuon submit` hands the commit on, because a job's working directory is no checkout.
"""

import os
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workers.common.source import ROOMS, ROOT, TRAINING_ROOMS, digest, files_of, training_code

PACKAGES = ("torch", "deepspeed", "ray", "numpy", "mlflow", "raymuon")
COMMIT_VARIABLE = "RAYMUON_COMMIT"
DIRTY = "-dirty"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The code of one driver and of the workers that it starts."""

    commit: str = ""
    """Of git, with `-dirty` where files differ from it; empty where there is no checkout."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that decide what is computed."""
    files: dict[str, str] = field(default_factory=dict)
    """Our own source files by path, and the first 16 hex digits of their SHA-256."""

    @property
    def digest(self) -> str:
        """One hash over all files."""
        return digest(self.files)


def provenance() -> Provenance:
    """Look at the code that this process runs."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Run from its folder, without an installation.
            continue
    return Provenance(commit=commit(), versions=versions, files=source_files())


@cache
def code_of() -> dict[str, str]:
    """Return in short which code this process runs: what a checkpoint tells of it (`Lineage.code`)."""
    try:
        ours = version("raymuon")
    except PackageNotFoundError:
        ours = ""
    return {"training": training_code(), "commit": commit(), "raymuon": ours}


def commit() -> str:
    """Return the commit that a job was submitted from, else that of the checkout."""
    return os.environ.get(COMMIT_VARIABLE) or git_commit()


def source_files() -> dict[str, str]:
    """Return all our source files, as `workers.common.source.files_of` does."""
    return files_of(ROOMS)


def git_commit() -> str:
    """Return the commit of the checkout that our code lies in; empty where it lies in none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).relative_to(ROOT).as_posix())  # Not a venv in another's.
        commit = git("rev-parse", "HEAD")
        return commit + (DIRTY if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def changes(then: Provenance, now: Provenance) -> list[str]:
    """Return a line for each thing of the code that is not as it was and can change a loss; others are left out."""
    lines = []
    for package in sorted(then.versions.keys() | now.versions.keys()):
        before, after = then.versions.get(package, "none"), now.versions.get(package, "none")
        if before != after and package in ("python", "torch", "deepspeed", "numpy"):
            lines.append(f"{package}: the run had {before}, here is {after}")
    paths = sorted(path for path in then.files.keys() | now.files.keys() if path.split("/")[0] in TRAINING_ROOMS)
    differing = [path for path in paths if then.files.get(path) != now.files.get(path)]
    if differing:
        commits = f" (commit {then.commit or 'unknown'}; here {now.commit or 'unknown'})"
        lines.append(f"{len(differing)} source file(s){commits}: {', '.join(differing)}")
    return lines
