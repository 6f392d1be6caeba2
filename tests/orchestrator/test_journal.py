"""What is stored of events outlives their classes, and versions of raymuon that know fewer or more of them."""

import json
from dataclasses import dataclass, replace

import pytest

from jobs.record import read_record
from orchestrator.record.events import (
    KINDS,
    DriverStarted,
    Fallback,
    Fault,
    Foreign,
    Membership,
    Recovery,
    SaveFailure,
    Tally,
    read_event,
)
from orchestrator.record.journal import FOLDER, Alive, Journal, Row, _check, read_journal
from orchestrator.record.recorder import _stored, go_on_with
from orchestrator.record.report import event_table, recovery_report
from tests.leading import config_of
from workers.common.storage import Store

OLD = [
    '{"event": "DriverStarted", "time": 1763780000.25, "step": 0, "attempt": 1}',
    '{"event": "Membership", "time": 1763780003.5, "step": 0, "generation": 1, "world_size": 2, '
    '"previous_world_size": 0, "reason": "start", "nodes": ["a", "a"], "pids": [7, 8], "source": "start", '
    '"restored_step": 0}',
    '{"event": "Fault", "time": 1763780009.0, "step": 4, "kind": "killed", "cause": "rank 1: its process died", '
    '"generation": 1, "during_recovery": false, "ranks": [1], "began": 1763780008.5}',
    '{"event": "Membership", "time": 1763780009.5, "step": 4, "generation": 2, "world_size": 1, '
    '"previous_world_size": 2, "reason": "fault", "nodes": ["a"], "pids": [7], "devices": ["cpu"], '
    '"source": "keepers", "restored_step": 4}',
    '{"event": "Recovery", "time": 1763780012.0, "step": 5, "reason": "fault", "cause": "rank 1: its process died", '
    '"generation": 2, "world_size": 1, "source": "keepers", "steps_redone": 1, "storage_bytes": 0, '
    '"resumed": 1763780011.0, "seconds": 2.5}',
    '{"event": "SaveFailure", "time": 1763780013.0, "step": 6, "cause": "disk full"}',
    '{"event": "Fallback", "time": 1763780014.0, "step": 6, "cause": "damaged", "damaged": 4, "good": 2}',
    '{"event": "DriverStarted", "time": 1763780020.0, "step": 2, "attempt": 2, "config": {"seed": 1}, '
    '"provenance": {"commit": "abc", "versions": {"torch": "2"}, "files": {"workers/loop.py": "0123"}}, "corpus": "c"}',
]
"""Lines as earlier versions have written them, the first ones without what has come since."""


def recovery(**fields: object) -> Recovery:
    """Return a recovery with some fields of its own."""
    event = read_event(json.loads(OLD[4]))
    assert isinstance(event, Recovery)
    return replace(event, **fields)


def test_old_lines_are_read_as_what_they_are():
    """A field that comes to be later needs a default, or runs of before lose their events."""
    kinds = (DriverStarted, Membership, Fault, Membership, Recovery, SaveFailure, Fallback, DriverStarted)
    for line, kind in zip(OLD, kinds, strict=True):
        stored = json.loads(line)
        event = read_event(stored)
        assert type(event) is kind
        assert stored.items() <= json.loads(json.dumps(event.record())).items(), "and they are stored the same way"
    assert read_event(json.loads(OLD[3])).pids == (7,), "tuples are tuples again"


def test_the_words_in_a_journal_are_not_those_of_the_code():
    words = {"DriverStarted", "Membership", "Fault", "Recovery", "SaveFailure", "Fallback"}
    assert set(KINDS) == words, "a word that has been stored stays"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class SomethingElse(Recovery):
        pass

    renamed = SomethingElse(**{name: value for name, value in json.loads(OLD[4]).items() if name != "event"})
    assert renamed.record()["event"] == "Recovery" and type(read_event(renamed.record())) is Recovery


NEWER = {
    "a kind that nobody knows": {"event": "Drained", "time": 5.0, "step": 3, "node": "a"},
    "a kind without the time": {"event": "Drained"},
    "a field that was dropped": {"event": "Recovery", "time": 5.0, "step": 3, "reason": "fault"},
    "a field of another type": {**json.loads(OLD[5]), "cause": ["a", "list"]},
    "a step of another type": {**json.loads(OLD[2]), "step": "three"},
}


@pytest.mark.parametrize("what", NEWER)
def test_what_another_version_has_written_is_shown_and_passed_on_and_counts_for_nothing(tmp_path, what):
    stored = NEWER[what]
    event = read_event(stored)
    assert isinstance(event, Foreign) and event.record() == stored
    config, store = config_of(tmp_path), Store(str(tmp_path))
    ship(store, *OLD[:5], json.dumps(stored), ROW)
    tally, events = go_on_with(config, _Rows(), Journal(store, 2), 1, 1763780030.0, pytest.fail)
    assert [one.seconds for one in tally.faults] == [2.5] and tally.productive_s == 2.0
    assert events[-1] == event and len(events) == 6 and json.loads(_stored(events))[-1] == stored
    for text in ("\n".join(event_table(events)), recovery_report(events, tally, 1.0)):
        assert f"{stored['event']} (of another version)" in text
    assert read_record(read_journal(store, pytest.fail)).steps.keys() == {1}


def test_a_row_of_another_version_without_what_this_one_adds_up_counts_for_nothing(tmp_path):
    config, store = config_of(tmp_path), Store(str(tmp_path))
    row = json.loads(ROW)
    ship(store, *OLD[:5], json.dumps({**row, "values": {"loss": 1.0}}))
    tally, _ = go_on_with(config, _Rows(), Journal(store, 2), row["step"], 1763780030.0, pytest.fail)
    assert tally.productive_s == 0.0


def test_what_a_newer_version_adds_is_left_out():
    """A field, or one more reason."""
    stored = {**json.loads(OLD[4]), "reason": "defragmented", "joules": 12.5}
    event = read_event(stored)
    assert isinstance(event, Recovery) and event.reason == "defragmented"
    assert Tally(0.0, recoveries=[event]).faults == []


def test_lines_that_are_no_events_are_typed_too(tmp_path):
    store = Store(str(tmp_path))
    lines = [Row("train", 3, 1.5, {"loss": float("inf")}), Alive(12.5, 99.0), recovery()]
    journal = Journal(store, 1)
    for line in lines:
        journal.add(line)
    journal.ship()
    assert list(read_journal(store, pytest.fail)) == lines
    ship(store, '{"of": "a newer kind"}', "[1]", OLD[0])
    assert list(read_journal(store, pytest.fail)) == [*lines, read_event(json.loads(OLD[0]))]


def test_what_stays_in_the_journal_is_not_in_the_artifact():
    started = json.loads(_stored([read_event(json.loads(OLD[-1]))]))
    place = {"event": "DriverStarted", "time": 1763780020.0, "step": 2, "attempt": 2}
    assert started == [{**place, "corpora": {}, "corpus": "c"}]


ROW = '{"series": "train", "step": 1, "time": 1.0, "values": {"step_seconds": 2.0, "lr": 0.01}}'


def ship(store: Store, *lines: str) -> None:
    """Write a journal's file as another version would."""
    data = "\n".join(lines).encode()
    store.create(f"{FOLDER}/0001-000009.jsonl", data + b"\n" + _check(data))


class _Rows:
    """An MLflow record that takes everything, and has nothing."""

    def __init__(self) -> None:
        self.marks = {"train": -1, "validation": -1}

    def log(self, *_: object) -> None:
        pass
