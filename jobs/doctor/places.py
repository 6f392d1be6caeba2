"""What is judged of storage, prepared data and tracking. Pure: `observation -> findings`."""

from collections.abc import Mapping, Sequence

from jobs.doctor.checks import check_clock
from jobs.doctor.findings import Check, Finding, size, stragglers
from jobs.doctor.seen import ClockSeen, PlaceSeen, TrackingSeen

STORE_SKEW_S = 60.0
"""A store's Date header has whole seconds, and a signature is valid for 15 minutes."""


def check_place(url: str, seen: Mapping[str, PlaceSeen]) -> list[Finding]:
    """Judge the folder for checkpoints, as each node and the driver reach it."""
    found = []
    for name, place in seen.items():
        if place.error:
            found.append(Finding("storage", name, "failure", place.error, mend_place(place.error)))
            continue
        found.append(Finding("storage", name, "ok", f"{url}: files can be created, read, listed and deleted"))
        if not place.fences:
            told = f"{url} does not honour conditional creates: only the lease keeps two drivers apart"
            mend = (
                "use a store that refuses If-None-Match: * on an existing key (AWS S3, SeaweedFS), or start no second"
            )
            found.append(Finding("storage", name, "warning", told, mend + " driver on a run"))
        if place.skew_s is not None and abs(place.skew_s) > STORE_SKEW_S:
            found += check_clock(name, ClockSeen(offset_s=-place.skew_s, round_trip_s=2.0), "the store")
    for what in ("write", "read"):
        rates = {name: getattr(place, f"{what}_bytes_per_s") for name, place in seen.items()}
        # The driver's own rate does not matter: keepers write and workers read.
        rates = {name: rate for name, rate in rates.items() if name != "driver" and not seen[name].error}
        if rates:
            told = f"{what}: {size(min(rates.values()))}/s to {size(max(rates.values()))}/s, all nodes at the same time"
            found.append(Finding("storage", "cluster", "ok", told))
        for name, share in stragglers(rates).items():
            told = f"{what}: {size(rates[name])}/s, {share:.2f} of the median"
            mend = "look at the node's network and at where the store is"
            found.append(Finding("storage", name, "warning", told, mend))
    return found


def mend_place(error: str) -> str:
    """Return what to do about a store's error, where that does not say it itself."""
    if "Read-only" in error or "Permission denied" in error:
        return "mount it for writing, or name another checkpoint.url"
    if "Connect" in error or "connect" in error or "timeout" in error.lower():
        return "check storage.s3_endpoint and that the node's network reaches it"
    return "" if "check" in error else "check checkpoint.url and storage.s3_endpoint"


def check_shared(
    check: Check, url: str, written: Sequence[str], seen: Mapping[str, Sequence[str] | str]
) -> list[Finding]:
    """Judge whether all see one folder.

    Args:
        check: `storage` or `data`.
        url: of the folder.
        written: whose marks were written into it.
        seen: the marks that each found there, or an error.
    """
    found = []
    for name, marks in seen.items():
        if isinstance(marks, str):
            found.append(Finding(check, name, "failure", marks, "every node must be able to read it"))
        elif missing := [mark for mark in written if mark not in marks]:
            told = f"{url}: does not see what {', '.join(missing)} wrote there: it is not the same folder on all nodes"
            mend = "use a folder that all nodes share (NFS, EFS), or an s3:// URL"
            found.append(Finding(check, name, "failure", told, mend))
        else:
            found.append(Finding(check, name, "ok", f"{url}: one folder, whoever looks"))
    return found


def check_tracking(seen: TrackingSeen) -> list[Finding]:
    """Judge the tracking server, or the database."""
    found = []
    if seen.error:
        mend = {
            401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) rightly",
            403: "give this user the right to edit the experiment (tracking.experiment), and to create it",
        }.get(seen.status, "start the server, or check tracking.uri" if seen.unreachable else "see the server's log")
        words = {401: "the credentials are wrong or missing", 403: "this user has not the right"}.get(seen.status)
        text = f"{words} (HTTP {seen.status})" if words else seen.error
        told = f"{seen.uri}: {text if seen.unreachable else f'{seen.doing}: {text}'}"
        return [Finding("tracking", "driver", "failure", told, mend)]
    did = seen.note or "run and artifact created, read back and deleted"
    found.append(Finding("tracking", "driver", "ok", f"{seen.uri}: {did} ({seen.seconds:.1f} s)"))
    if seen.server and seen.server.split(".")[:2] != seen.client.split(".")[:2]:
        told = f"the server is MLflow {seen.server}, the client {seen.client}"
        found.append(Finding("tracking", "driver", "warning", told, "bring both to the same minor release"))
    if seen.left:
        told, mend = f"could not be deleted: {seen.left}", "give this user the right to delete, or remove it by hand"
        found.append(Finding("tracking", "driver", "warning", told, mend))
    return found
