"""Looks for secrets in everything that a submitted run leaves: files, tables, objects in S3, answers of servers."""

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec

OWN = {"secrets.json", "env.sh", "ray-token", "s3.json"}
"""Where the stack itself keeps them, for its owner alone."""


@dataclass
class Search:
    secrets: dict[str, str]
    searched: int = 0
    places: list[str] = field(default_factory=list)

    def look(self, where: str, content: bytes | str) -> None:
        self.searched += 1
        data = content.encode() if isinstance(content, str) else content
        self.places += [f"{name} in {where}" for name, secret in self.secrets.items() if secret.encode() in data]


def places_of(shell, run_id: str, secrets: dict[str, str]) -> Search:
    search = Search(secrets)
    run = shell.mlflow.get_run(run_id)
    search.look("MLflow's run", json.dumps(run.to_dictionary()))
    told = _jobs(shell)
    assert run_id in told
    search.look("the list of jobs", told)
    search.look("the job's log", shell.run("logs", run_id))
    for folder in (shell.stack, shell.folder, _session(shell)):
        for path in _files(folder):
            search.look(str(path), path.read_bytes())
    endpoint = next(word for word in shell.overrides if word.startswith("storage.s3_endpoint=")).split("=", 1)[1]
    store = fsspec.filesystem("s3", endpoint_url=endpoint)
    for name in store.find("raymuon"):
        search.look(f"s3://{name}", store.cat_file(name))
    return search


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files below a folder, without those that are the secrets' own."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in OWN:
            yield path


def _session(shell) -> Path:
    """Return the folder of the stack's Ray: its logs, and what its nodes were told."""
    command = shell.processes("gcs_server")[0].cmdline()
    return Path(next(word.split("=", 1)[1] for word in command if word.startswith("--session-dir=")))


def _jobs(shell) -> str:
    """Return what the dashboard tells of all jobs, as it tells it to everybody with the token."""
    token = (shell.stack / "ray-token").read_text()
    url = f"{shell.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    return urllib.request.urlopen(request, timeout=30).read().decode()
