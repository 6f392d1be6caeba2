"""Workers and keepers that pass from run to run are as good as new ones, and know nothing of the run before."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from optim.config import OptimConfig
from orchestrator.config import RunConfig
from orchestrator.group import warm as warm_module
from orchestrator.group.handles import Gone
from orchestrator.group.keeper import Keeper
from orchestrator.group.warm import warm
from tests.closeness import ADAMW_EPS
from tests.faults import FaultyMember
from tests.leading import Lead, Notes, config_of, tensors_of
from tests.processes import ProcessCluster
from tests.workers import test_llama
from workers.common.errors import TrainingError
from workers.common.wire import Connection
from workers.config import StorageConfig, TelemetryConfig
from workers.controls import Pause
from workers.member import Member
from workers.phases import Phase
from workers.reports import Report

STEPS = 6


def moonlight(folder: Path, workers: int = 1, **changes) -> RunConfig:
    return config_of(
        folder,
        scaling={"min_workers": workers, "max_workers": workers},
        train={"steps": STEPS, "global_batch": 4, **changes.pop("train", {})},
        telemetry=TelemetryConfig(every=2),
        **changes,
    )


def llama(folder: Path, workers: int = 1) -> RunConfig:
    optim = OptimConfig(name="adamw", lr=3e-3, eps=ADAMW_EPS)
    config = moonlight(folder, workers, train={"precision": "bf16", "global_batch": 8, "seq_len": 24}, optim=optim)
    return replace(config, model=test_llama.TINY, seed=5)


def led(config: RunConfig, joined, folder: Path, on_step=lambda step: None) -> Notes:
    lead = Lead(config, joined.slots(config.scaling), folder)
    lead.notes.on_step = on_step
    with lead:
        return lead.wait()


def pids(notes: Notes) -> set[int]:
    return {pid for membership in notes.memberships for pid in membership.pids}


def keepers(cluster: ProcessCluster) -> list[int]:
    return [handle.process.pid for handle in cluster.started if handle.made is Keeper]


def test_a_run_in_workers_of_others_is_bitwise_the_run_of_new_ones(tmp_path):
    """Other model, optimizer, precision, batch, length and seed before it; two workers, whose ranks may change."""
    order = [llama, moonlight, llama]
    cold = {}
    for make in (llama, moonlight):
        folder = tmp_path / f"cold-{make.__name__}"
        cold[make] = folder, led(make(folder, 2), ProcessCluster({"a": 2}), folder)
    cluster = ProcessCluster({"a": 2})
    with warm(cluster) as joined:
        seen = []
        for number, make in enumerate(order):
            folder = tmp_path / str(number)
            notes = led(make(folder, 2), joined, folder)
            seen.append(pids(notes))
            fresh, expected = cold[make]
            assert [(row.loss, row.grad_norm, row.lr, row.tokens) for row in notes.rows] == [
                (row.loss, row.grad_norm, row.lr, row.tokens) for row in expected.rows
            ]
            assert [one.loss for one in notes.validations] == [one.loss for one in expected.validations]
            ours, theirs = tensors_of(f"{folder}/run"), tensors_of(f"{fresh}/run")
            assert [key for key, tensor in theirs.items() if tensor.tobytes() != ours[key].tobytes()] == []
            assert [membership.generation for membership in notes.memberships] == [1] and notes.faults == []
        assert len(seen[0]) == 2 and all(one == seen[0] for one in seen), "the same two processes all along"
        assert len(keepers(cluster)) == 1
    wait_until(lambda: not any(handle.process.is_alive() for handle in cluster.started))
    assert cluster.free() == {"a": 2}, "all slots are given back"


def wait_until(holds, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Dawdling(FaultyMember):
    """A member whose calls may come to it late."""

    def pause_late(self, seconds: float) -> None:
        time.sleep(seconds)
        self.pause(1, save=True)


def test_a_late_call_of_the_run_before_does_not_reach_the_next(tmp_path):
    """It asks for a pause of generation 1, which is the number of the next run's, too."""
    cluster = ProcessCluster({"a": 1}, Dawdling)
    with warm(cluster) as joined:
        config = moonlight(tmp_path / "first")
        lead = Lead(config, joined.slots(config.scaling), tmp_path / "first")
        asked: list[Future] = []

        def ask(step: int) -> None:
            if step == STEPS:
                (worker,) = lead.pool.workers.values()
                asked.append(worker.handle.call("pause_late", 1.0))

        lead.notes.on_step = ask
        with lead:
            first = lead.wait()
        (handle,) = (call for call in [lead.pool.workers[0].handle])
        with pytest.raises(Gone, match="another run's"):
            handle.call("pause", 1, True).result(5)
        second = led(moonlight(tmp_path / "second"), joined, tmp_path / "second")
        assert asked[0].done() and pids(first) == pids(second)
        assert len(second.memberships) == 1 and second.losses == first.losses


def test_a_member_forgets_its_run():
    member = Member()
    member._outbox.put(Report(generation=1, rank=0, time=0.0))
    member._pause, member._told, member._busy_s, member._generation = (1, Pause(leave=True)), 7, 3.0, 1
    assert member.renew(1.0)
    pulse = member.poll(0.0, -1)
    assert pulse.reports == [] and pulse.mark is not None
    assert (pulse.mark.generation, pulse.mark.step, pulse.mark.busy_s) == (0, -1, 0.0)
    assert member._pause == (0, Pause()) and member._told == -1
    until = threading.Event()
    member._thread = threading.Thread(target=until.wait)
    member._thread.start()
    assert not member.renew(0.01), "it still trains"
    until.set()
    assert member.renew(10.0)
    member._terminating = True
    assert not member.renew(1.0), "it was asked to end"


def test_a_keeper_forgets_its_run():
    keeper = Keeper("127.0.0.1", "a" * 32, StorageConfig())
    old = keeper.address()
    peer = Connection.open(old)
    keeper.inventory(7)
    assert keeper.renew("b" * 32, StorageConfig(s3_endpoint="http://there"))
    with pytest.raises(OSError):
        peer.receive()
    with pytest.raises(OSError):
        Connection.open(old).receive()
    assert keeper.address().token == "b" * 32 and keeper._fence == 0 and keeper._s3_endpoint == "http://there"
    Connection.open(keeper.address()).close()


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_worker_that_dies_or_hangs_while_it_waits_is_not_used(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(warm_module, "RENEW_S", 0.3)
    cluster = ProcessCluster({"a": 1})
    with warm(cluster) as joined:
        first = led(moonlight(tmp_path / "first"), joined, tmp_path / "first")
        (pid,) = pids(first)
        os.kill(pid, harm)
        second = led(moonlight(tmp_path / "second"), joined, tmp_path / "second")
        assert pid not in pids(second) and second.faults == [] and second.losses == first.losses
    wait_until(lambda: not any(handle.process.is_alive() for handle in cluster.started))


def inject(lead: Lead, phase: Phase, action: str) -> int:
    """Have the last worker do something bad in step 3; return its process."""
    lead.pool.wait(lambda: len(lead.pool.free) == lead.config.scaling.max_workers, lambda: None, 60)
    worker = lead.pool.free[-1]
    worker.handle.call("inject", phase, 3, action).result(10)
    return worker.ready.pid


def test_a_worker_that_was_lost_is_gone_and_its_peer_is_used_again(tmp_path):
    cluster = ProcessCluster({"a": 2}, FaultyMember)
    with warm(cluster) as joined:
        config = moonlight(tmp_path / "first", 2)
        lead = Lead(config, joined.slots(config.scaling), tmp_path / "first")
        killed = inject(lead, Phase.COMPUTE, "kill")
        with lead:
            first = lead.wait()
        last = set(first.memberships[-1].pids)
        second = led(moonlight(tmp_path / "second", 2), joined, tmp_path / "second")
        assert len(first.faults) == 1 and killed not in pids(second) and pids(second) == last


def test_workers_of_a_run_that_failed_are_used_again(tmp_path):
    cluster = ProcessCluster({"a": 1}, FaultyMember)
    with warm(cluster) as joined:
        config = moonlight(tmp_path / "first", recovery={"max_failures": 0})
        lead = Lead(config, joined.slots(config.scaling), tmp_path / "first")
        inject(lead, Phase.REDUCE, "raise")
        with lead, pytest.raises(TrainingError, match="a test broke this worker"):
            lead.wait()
        second = led(moonlight(tmp_path / "second"), joined, tmp_path / "second")
        assert pids(lead.notes) == pids(second)
    fresh = led(moonlight(tmp_path / "fresh"), ProcessCluster({"a": 1}), tmp_path / "fresh")
    assert second.losses == fresh.losses


def test_runs_at_the_same_time_have_workers_of_their_own(tmp_path):
    """Three runs on two slots, twice: the third waits for a slot, and gets the one that is parked first."""
    cluster = ProcessCluster({"a": 2})
    found: list[Notes] = []

    def run(number: int) -> None:
        for name in (f"{number}-one", f"{number}-two"):
            config = replace(moonlight(tmp_path / name), seed=number)
            found.append(led(config, joined, tmp_path / name))

    with warm(cluster) as joined:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(found) == 6 and len(set().union(*map(pids, found))) == 2, "two processes have trained six runs"
    assert len({tuple(notes.losses) for notes in found}) == 3, "by seed"


def test_what_waits_makes_room_for_a_run_with_another_reservation(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_module, "PATIENCE_S", 0.05)
    cluster = ProcessCluster({"a": 1})
    with warm(cluster) as joined:
        first = led(moonlight(tmp_path / "first"), joined, tmp_path / "first")
        config = moonlight(tmp_path / "second")
        config = replace(config, scaling=replace(config.scaling, cpus_per_worker=0.5))
        second = led(config, joined, tmp_path / "second")
        assert not pids(first) & pids(second)
