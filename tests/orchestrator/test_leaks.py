"""Fifty recoveries in one process: an old engine that stays alive would show in memory, descriptors and threads."""

import pytest

from orchestrator.record.events import Recovery
from tests.faults import EagerMember
from tests.leading import Lead, config_of
from tests.processes import ProcessCluster
from workers.config import TelemetryConfig
from workers.phases import Phase

RECOVERIES = 50


def test_fifty_recoveries_leave_nothing_behind(tmp_path):
    recovery = {"max_in_a_row": 1000}
    config = config_of(
        tmp_path,
        scaling={"min_workers": 2, "max_workers": 2},
        train={"steps": 10_000},
        telemetry=TelemetryConfig(every=2),
        recovery=recovery,
    )
    lead = Lead(config, ProcessCluster({"a": 2}, EagerMember), tmp_path)
    measured: list[list[dict[str, int]]] = []

    def break_again() -> None:
        number = len(lead.notes.recoveries)
        if number == RECOVERIES:
            lead.stop.request()
        else:
            member = lead.pool.workers[lead.controller.generation.members[number % 2]].handle
            phase = (Phase.COMPUTE, Phase.REDUCE, Phase.BOUNDARY)[number % 3]
            member.call("inject", phase, lead.controller.progress.step + 1, "raise")

    def recovered(event) -> None:
        if isinstance(event, Recovery):
            members = [lead.pool.workers[number].handle for number in lead.controller.generation.members]
            measured.append([member.call("measure").result(30) for member in members])
            break_again()

    lead.notes.on_event = recovered
    lead.notes.on_step = lambda step: break_again() if step == 2 else None
    with lead:
        notes = lead.wait()
    assert len(notes.recoveries) == RECOVERIES and {fault.kind for fault in notes.faults} == {"error"}
    assert len({member.pids for member in notes.memberships}) == 1, "the same two processes all along"
    assert all(recovery.steps_redone == 0 for recovery in notes.recoveries)
    for third, last in zip(measured[2], measured[-1], strict=True):
        print(third, last)
        for key, value in third.items():
            assert last[key] <= 1.05 * value, f"{key} grew from {value} to {last[key]}"


@pytest.fixture(autouse=True)
def _few_arenas(monkeypatch):
    # One arena: freed memory of one thread would otherwise lie unused while the next thread asks for more.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
