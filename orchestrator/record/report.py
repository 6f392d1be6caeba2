"""What a run tells in words: its description in MLflow, and the report of what it has survived. Pure functions."""

from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.config import RunConfig
from orchestrator.record.events import (
    DriverStarted,
    Event,
    Fallback,
    Fault,
    Foreign,
    Membership,
    Recovery,
    SaveFailure,
    Tally,
)
from orchestrator.record.provenance import Provenance
from workers.common.text import visible

DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow's UI shows as the run's description, as Markdown."""
SHOWN, CELL = 20, 200
"""Events in the description, and characters of one: MLflow cuts a description at 8,000."""


@dataclass(frozen=True)
class Links:
    """Where everything of a run is."""

    url: str
    """Its folder."""
    steps: int
    """Of the config in force."""
    code: Provenance
    job: str = ""
    """Submission id of the Ray job that leads it; empty where a terminal does."""
    dashboard: str = ""
    """Of its Ray cluster, as the cluster names it."""

    def tags(self) -> dict[str, str]:
        """Return them as tags of the MLflow run."""
        tags = {
            "raymuon.checkpoint_url": self.url,
            "raymuon.steps": str(self.steps),
            "raymuon.commit": self.code.commit or "unknown",
            "raymuon.code": self.code.digest,
            "mlflow.source.git.commit": self.code.commit.removesuffix("-dirty"),
            "raymuon.job_id": self.job,
            "raymuon.ray_dashboard": self.dashboard,
        }
        return {key: value for key, value in tags.items() if value}


def describe(config: RunConfig, run_id: str, links: Links, events: list[Event]) -> str:
    """Return the description of a run: what it is, where everything is, and what has happened to it."""
    train = config.train
    batch = f"{' to '.join(map(str, sorted({*train.batches})))} sequences of {train.seq_len} tokens"
    lines = [
        f"A {config.model.name} trained with {config.optim.name}: {train.steps:,} steps of {batch}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| files | `{links.url}` |",
        f"| code | {links.code.commit or 'no git commit'}, files {links.code.digest} |",
    ]
    if links.job:
        lines.append(f"| Ray job | `{links.job}` |")
    if links.dashboard:
        lines.append(f"| Ray dashboard | {links.dashboard} |")
    lines += [
        f"| where it is | `raymuon status {run_id}` |",
        f"| stop it, so that it can go on | `raymuon stop {run_id}` |",
        f"| train a stretch of it once more | `raymuon replay {run_id} --steps A:B` |",
        "",
        *event_table(events[-SHOWN:]),
    ]
    if len(events) > SHOWN:
        lines.append(f"\nThe last {SHOWN} of {len(events)} events; the artifact `events.json` has them all at the end.")
    return "\n".join(lines)


def recovery_report(events: list[Event], tally: Tally, now: float) -> str:
    """Return what a run has survived, and what that has cost, as Markdown; `now` on the monotonic clock."""
    mttr = tally.mean_time_to_recovery()
    redone = sum(recovery.steps_redone for recovery in tally.recoveries)
    read = sum(recovery.storage_bytes for recovery in tally.recoveries if recovery.reason != "start")
    return "\n".join(
        [
            "# What this run has survived",
            "",
            "| | |",
            "| --- | --- |",
            f"| faults recovered from | {len(tally.faults)} |",
            f"| mean time from a fault to the next new step | {'-' if mttr is None else f'{mttr:.2f} s'} |",
            f"| steps redone | {redone} |",
            f"| read from storage for it | {read / 1e6:.1f} MB |",
            f"| goodput: share of the time that went into steps that count | {tally.goodput(now):.1%} |",
            "",
            *event_table(events),
            "",
        ]
    )


def event_table(events: list[Event]) -> list[str]:
    """Return the lines of a Markdown table of events."""
    rows = [f"| {_when(event.time)} | {event.step} | {_what(event)} |" for event in events]
    return ["| UTC | step | what happened |", "| --- | --- | --- |", *rows]


def _what(event: Event) -> str:
    """Say an event in a cell of a table."""
    match event:
        case DriverStarted():
            said = f"driver started, attempt {event.attempt}"
        case Membership():
            change = f"{event.previous_world_size} -> {event.world_size} workers"
            source = f"from {event.source}" if event.source != "start" else "from the start"
            chosen = "".join(f", {key}={value}" for key, value in event.chosen.items())
            said = f"generation {event.generation} ({event.reason}): {change}, {source}{chosen}"
        case Fault():
            said = f"fault ({event.kind}): {event.cause}"
        case Recovery():
            said = f"training again after {event.seconds:.2f} s, {event.steps_redone} step(s) redone"
        case SaveFailure():
            said = f"checkpoint not written: {event.cause}"
        case Fallback():
            said = f"checkpoint of step {event.damaged} is damaged, back to {event.good}: {event.cause}"
        case Foreign():
            said = f"{event.stored['event']} (of another version)"
        case _:
            raise AssertionError(event)
    return visible(said).replace("|", "/").replace("\n", " ")[:CELL]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
