"""What happens at each kind of fault, over real processes: who goes on, from where, and that nothing is lost."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from orchestrator.group.keeper import Keeper
from orchestrator.log.run_log import RunLog
from orchestrator.record.events import Membership
from tests.faults import FaultyMember, ForeignMember, ForgetfulMember
from tests.leading import Lead, Notes, config_of, tensors_of
from tests.ledger import assert_every_sample_once
from tests.processes import ProcessCluster, ProcessHandle
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from workers.common.errors import ClusterError, TrainingError
from workers.common.storage import Store
from workers.config import StorageConfig
from workers.phases import Phase
from workers.reports import StepDone

TWO = {"min_workers": 2, "max_workers": 2}
THREE = {"min_workers": 3, "max_workers": 3}
STEPS = 24


def assert_equal_states(a, b) -> None:
    first, second = (tensors_of(f"{folder}/run") for folder in (a, b))
    assert first.keys() == second.keys()
    assert [key for key, tensor in first.items() if not np.array_equal(tensor, second[key])] == []


def assert_every_sample_of(lead: Lead, folder) -> None:
    assert_every_sample_once(folder / "ledger", lead.config.train, lead.config.seed, lead.corpora)


def config_with_ledger(folder, **changes):
    config = config_of(folder, **changes)
    return replace(config, data=replace(config.data, ledger=f"{folder}/ledger"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = config_with_ledger(folder, scaling=THREE, train={"steps": STEPS})
    with Lead(config, ProcessCluster({"a": 3}), folder) as lead:
        notes = lead.wait()
    assert notes.faults == [] and notes.commits == [STEPS] and [row.step for row in notes.rows] == [*range(1, 25)]
    return folder, notes


def broken_run(folder, nodes, break_it, scaling=THREE, recovery=None, **changes) -> tuple[Lead, Notes]:
    """Run to the end, and call `break_it(lead)` once, when step 8 is finished."""
    config = config_with_ledger(folder, scaling=scaling, train={"steps": STEPS}, recovery=recovery, **changes)
    lead = Lead(config, ProcessCluster(nodes, FaultyMember), folder)
    lead.notes.on_step = lambda step: break_it(lead) if step == 8 else None
    with lead:
        notes = lead.wait()
    assert lead.outcome == "finished"
    assert [row.step for row in notes.rows] == [*range(1, STEPS + 1)]
    assert_every_sample_of(lead, folder)
    return lead, notes


def inject(lead: Lead, rank: int, *plan) -> Future:
    return lead.pool.workers[lead.controller.generation.members[rank]].handle.call("inject", *plan)


def inject_at_start(lead: Lead, rank: int, *plan) -> None:
    """Have it in the member before it begins: a step is told of late, when others may be finished."""
    lead.notes.on_event = lambda event: (
        inject(lead, rank, *plan).result(60) if isinstance(event, Membership) and event.generation == 1 else None
    )


@pytest.mark.parametrize(
    ("phase", "action", "times"),
    [
        (Phase.COMPUTE, "kill", 1),
        (Phase.REDUCE, "raise", 1),
        (Phase.GATHER, "exit", 2),  # After the last group's optimizer step: torn between it and the all-gather.
        (Phase.GATHER, "exit soon", 2),
        (Phase.SNAPSHOT, "kill", 1),
        (Phase.BOUNDARY, "exit", 1),
        (Phase.AGREE, "kill", 1),
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_that_dies_anywhere_leaves_no_trace(uninterrupted, tmp_path, phase, action, times, rank):
    folder, expected = uninterrupted
    _, notes = broken_run(tmp_path, {"a": 4}, lambda lead: inject(lead, rank, phase, 11, action, times))
    (fault,) = notes.faults
    assert fault.kind == ("error" if action == "raise" else "killed") and rank in fault.ranks
    (recovery,) = notes.recoveries
    assert (recovery.reason, recovery.source, recovery.steps_redone) == ("fault", "keepers", 0)
    assert recovery.storage_bytes == 0 and recovery.world_size == 3
    assert [row.loss for row in notes.rows] == [row.loss for row in expected.rows]
    assert_equal_states(folder, tmp_path)


@pytest.mark.parametrize("action", ["stop", "spin"])
def test_a_worker_that_hangs_is_found_and_its_stack_is_kept(uninterrupted, tmp_path, action):
    folder, _ = uninterrupted
    _, notes = broken_run(
        tmp_path, {"a": 4}, lambda lead: inject(lead, 1, Phase.COMPUTE, 11, action), recovery={"hang_s": 5.0}
    )
    (fault,) = notes.faults
    assert fault.kind == "hung" and fault.ranks[0] == 1
    assert ("no sign of life" if action == "stop" else "phase compute of step") in fault.cause
    (text,) = notes.stacks.values()
    assert "_forward_backward" in text, "the stack names the place"
    assert_equal_states(folder, tmp_path)


@pytest.mark.parametrize("standby", [0, 1])
def test_a_worker_that_is_asked_to_end_is_left_at_a_boundary(uninterrupted, tmp_path, standby):
    """SIGTERM: no fault, no step redone, and the process ends; at a fixed world size another one takes its place."""
    folder, _ = uninterrupted
    asked = []

    def terminate(lead):
        worker = lead.pool.workers[lead.controller.generation.members[1]]
        asked.append(worker.handle.process)
        os.kill(worker.handle.process.pid, signal.SIGTERM)

    _, notes = broken_run(tmp_path, {"a": 4}, terminate, scaling={**THREE, "standby": standby})
    assert notes.faults == []
    (change,) = notes.recoveries
    assert (change.reason, change.source, change.steps_redone, change.storage_bytes) == ("preemption", "keepers", 0, 0)
    assert "rank 1 was asked to end (SIGTERM)" in change.cause
    assert notes.memberships[1].world_size == 3 and asked[0].pid not in notes.memberships[1].pids
    asked[0].join(10)
    assert not asked[0].is_alive()
    assert_equal_states(folder, tmp_path)


def test_a_lost_node_is_recovered_from_its_buddy(tmp_path):
    """The copy of the step that was finished last may still be on its way."""
    scaling = {"min_workers": 2, "max_workers": 3, "standby": 1}
    _, notes = broken_run(tmp_path, {"a": 2, "b": 2}, lambda lead: lead.cluster.kill_node("b"), scaling=scaling)
    recovery = notes.recoveries[0]
    assert (recovery.reason, recovery.source, recovery.storage_bytes) == ("fault", "keepers", 0)
    assert recovery.steps_redone in (0, 1) and recovery.world_size == 2


def test_a_lost_node_whose_copies_are_away_costs_no_step(tmp_path):
    """It dies in step 11, once its workers have waited for the copies of step 10."""
    config = config_with_ledger(tmp_path, scaling={"min_workers": 1, "max_workers": 3}, train={"steps": STEPS})
    lead = Lead(config, ProcessCluster({"a": 2, "b": 1}, FaultyMember), tmp_path)
    inject_at_start(lead, 2, Phase.REDUCE, 11, "stop")

    def kill(step: int) -> None:
        if step == 8:
            number = lead.controller.generation.members[2]
            worker, deadline = psutil.Process(lead.pool.workers[number].ready.pid), time.monotonic() + 100
            while worker.status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            lead.cluster.kill_node("b")

    lead.notes.on_step = kill
    with lead:
        notes = lead.wait()
    recovery = notes.recoveries[0]
    assert (recovery.source, recovery.steps_redone, recovery.storage_bytes) == ("keepers", 0, 0)
    assert notes.memberships[1].restored_step == 10 and recovery.world_size == 2
    assert_every_sample_of(lead, tmp_path)


def test_a_validation_is_not_lost_with_the_rank_that_tells_it(tmp_path):
    """Otherwise the checkpoint of its step, all of which is in storage, would not count."""
    config = config_of(
        tmp_path, scaling=THREE, train={"steps": STEPS, "validate_every": 10}, checkpoint={"every": 10}, recovery=None
    )
    lead = Lead(config, ProcessCluster({"a": 3}, ForgetfulMember), tmp_path)
    inject_at_start(lead, 0, Phase.REDUCE, 12, "kill")
    with lead:
        notes = lead.wait()
    assert [one.step for one in notes.validations] == [0, 10, 20, STEPS] and notes.commits == [10, 20, STEPS]
    assert len(notes.faults) == 1 and notes.memberships[1].restored_step > 10, "nobody validated step 10 once more"


def test_a_survivor_that_cannot_begin_is_replaced(uninterrupted, tmp_path):
    """It answers polls, so only its answer to the start tells."""
    folder, _ = uninterrupted

    def break_two(lead: Lead) -> None:
        lead.pool.workers[lead.controller.generation.members[1]].handle.call("refuse")
        inject(lead, 2, Phase.COMPUTE, 11, "kill")

    _, notes = broken_run(tmp_path, {"a": 4}, break_two)
    assert [fault.during_recovery for fault in notes.faults] == [False, True]
    assert "kept this worker from starting" in notes.faults[1].cause
    assert_equal_states(folder, tmp_path)


class KeeperlessCluster(ProcessCluster):
    """No keeper starts on node b: its address is another machine's."""

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> ProcessHandle:
        return self._start(node, Keeper, "192.0.2.1" if node == "b" else "127.0.0.1", token, storage)


def test_keepers_that_do_not_start_end_a_run_that_has_not_begun(tmp_path, soon):
    config = config_of(tmp_path, scaling=TWO, train={"steps": STEPS})
    with (
        Lead(config, KeeperlessCluster({"a": 1, "b": 1}), tmp_path) as lead,
        pytest.raises(ClusterError, match="keepers on node b end before they answer: its process died"),
    ):
        lead.wait()


def test_workers_with_other_code_do_not_train(tmp_path):
    config = config_of(tmp_path, scaling=TWO, train={"steps": STEPS})
    with (
        Lead(config, ProcessCluster({"a": 2}, ForeignMember), tmp_path) as lead,
        pytest.raises(ClusterError, match="its optim/ and workers/ are not the driver's"),
    ):
        lead.wait()
    assert lead.notes.rows == []


def test_a_node_on_which_no_keeper_starts_does_not_end_the_start_of_the_others(tmp_path, soon):
    config = config_of(tmp_path, scaling={"max_workers": 2}, train={"steps": STEPS})
    with Lead(config, KeeperlessCluster({"a": 1, "b": 1}), tmp_path) as lead:
        notes = lead.wait()
    assert any("keepers on node b" in text for text in notes.notices)
    assert set(notes.worlds) == {1} and notes.commits == [STEPS]


def test_a_new_node_on_which_no_keeper_starts_is_told_of_once(tmp_path, soon):
    config = config_of(tmp_path, scaling={"max_workers": 2}, train={"steps": 100_000})
    cluster = KeeperlessCluster({"a": 1})
    lead = Lead(config, cluster, tmp_path)

    def add(step: int) -> None:
        cluster.nodes["b"] = 1
        if len(cluster.processes.get("b", [])) >= 5 and not lead.stop.requests:
            lead.stop.request()

    lead.notes.on_step = add
    with lead:
        notes = lead.wait()
    assert [text for text in notes.notices if "keepers on node b" in text] == [
        "keepers on node b end before they answer: its process died; nothing begins to train there until one does"
    ]
    assert set(notes.worlds) == {1} and notes.faults == []


def test_a_standby_takes_the_place_at_once(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    seen = {}

    def kill(lead):
        while len(lead.pool.candidates) < 4:
            lead.pool.refresh()
        seen["standby"] = ({c.number for c in lead.pool.candidates} - set(lead.controller.generation.members)).pop()
        inject(lead, 1, Phase.COMPUTE, 9, "kill")

    lead, notes = broken_run(tmp_path, {"a": 4}, kill, scaling={**THREE, "standby": 1})
    assert len(notes.faults) == 1 and seen["standby"] in lead.controller.generation.members
    assert_equal_states(folder, tmp_path)


def test_a_keeper_that_dies_does_not_stop_the_run(uninterrupted, tmp_path):
    folder, _ = uninterrupted

    def kill_keeper(lead):
        lead.pool.keepers["a"].handle.kill()

    _, notes = broken_run(tmp_path, {"a": 2, "b": 1}, kill_keeper)
    assert notes.faults == [] and any("keeper" in notice for notice in notes.notices)
    assert notes.commits == [STEPS]
    assert_equal_states(folder, tmp_path)


def test_a_second_fault_during_recovery(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    config = config_with_ledger(tmp_path, scaling=THREE, train={"steps": STEPS})
    lead = Lead(config, ProcessCluster({"a": 5}, FaultyMember), tmp_path)
    lead.notes.on_step = lambda step: inject(lead, 1, Phase.COMPUTE, 11, "kill") if step == 8 else None

    def again(event):
        if event in lead.notes.faults and len(lead.notes.faults) == 1:
            for candidate in lead.pool.candidates[:1]:
                lead.pool.workers[candidate.number].handle.call("inject", Phase.RESTORE, -1, "kill")

    lead.notes.on_event = again
    with lead:
        notes = lead.wait()
    assert [fault.during_recovery for fault in notes.faults] == [False, True]
    assert len(notes.recoveries) == 1 and notes.recoveries[0].steps_redone == 0
    assert_equal_states(folder, tmp_path)


def test_a_fault_before_the_rendezvous_costs_no_survivor(tmp_path):
    """Whoever would be rank 0 dies before the group is told to train: the others have nothing to leave."""
    config = config_with_ledger(tmp_path, scaling={"max_workers": 4}, train={"steps": STEPS})
    lead = Lead(config, ProcessCluster({"a": 4}, FaultyMember), tmp_path)
    lead.notes.on_step = lambda step: inject(lead, 3, Phase.COMPUTE, 11, "kill") if step == 8 else None
    victims = []

    def again(event):
        if event in lead.notes.faults and not victims:
            victims.append(min(c.number for c in lead.pool.candidates))
            lead.pool.workers[victims[0]].handle.kill()

    lead.notes.on_event = again
    with lead:
        notes = lead.wait()
    before, after = notes.memberships[0], next(m for m in notes.memberships if m.generation == 3)
    assert set(before.pids[1:3]) <= set(after.pids), "both survivors train on in their processes"
    assert [fault.during_recovery for fault in notes.faults] == [False, True]
    assert notes.stacks == {} and notes.recoveries[0].steps_redone == 0
    assert_every_sample_of(lead, tmp_path)


@pytest.mark.numeric
def test_announced_changes_of_the_world_size_touch_no_storage(tmp_path):
    """4 -> 3 -> 5 -> 1 -> 2; each first loss as at the old world size from the same state, within 1e-5."""
    scaling, keep_all = {"max_workers": 4, "settle_s": 5.0}, {"every": 1, "keep_last": 0}
    config = config_of(tmp_path, scaling=scaling, train={"steps": 2000}, checkpoint=keep_all)
    cluster = ProcessCluster({"n1": 1, "n2": 1, "n3": 1, "n4": 1})
    lead = Lead(config, cluster, tmp_path)
    done = []

    def change(step: int) -> None:
        since, world_size = lead.notes.memberships[-1].restored_step, lead.notes.worlds[-1]
        if step < since + 4:
            return
        match world_size, len(done):
            case 4, 0:
                cluster.going = {"n4": 30.0}
            case 3, 1:
                cluster.going = {}
                cluster.kill_node("n4")
                cluster.nodes |= {"n5": 1, "n6": 1}
                object.__setattr__(lead.pool.scaling, "max_workers", 5)
            case 5, 2:
                cluster.going = dict.fromkeys(("n2", "n3", "n5", "n6"), 30.0)
            case 1, 3:
                cluster.going = dict.fromkeys(("n3", "n5", "n6"), 30.0)
            case 2, 4:
                lead.stop.request()
            case _:
                return
        done.append(step)

    lead.notes.on_step = change
    with lead:
        notes = lead.wait()
    changes = [(m.previous_world_size, m.world_size) for m in notes.memberships[1:]]
    assert changes == [(4, 3), (3, 5), (5, 1), (1, 2)], notes.memberships
    assert notes.faults == [] and all(r.storage_bytes == 0 and r.steps_redone == 0 for r in notes.recoveries)
    losses = {row.step: row.loss for row in notes.rows}
    for member in notes.memberships[1:]:
        arguments = str(tmp_path), member.restored_step, lead.controller.saves.task
        again = run_ranks(member.previous_world_size, next_loss, *arguments)[0]
        assert losses[member.restored_step + 1] == pytest.approx(again, rel=1e-5)


def next_loss(rank: int, world_size: int, folder: str, step: int, task) -> float:
    """Train one step from the checkpoint of `step` at another world size."""
    manifest = RunLog(Store(f"{folder}/run")).manifest(step)
    trainer, told = trainer_of(rank, world_size, replace(task, manifest=manifest), restore=True)
    trainer._step()
    losses = sum(row["loss"] for row in told.of(StepDone))
    return trainer.engine.all_reduce(torch.tensor([losses], dtype=torch.float64)).item()


def test_the_sudden_death_of_four_of_five_finds_storage(tmp_path):
    config = config_with_ledger(tmp_path, scaling={"max_workers": 5}, train={"steps": STEPS}, checkpoint={"every": 5})
    cluster = ProcessCluster({"n1": 1, "n2": 1, "n3": 1, "n4": 1, "n5": 1})
    lead = Lead(config, cluster, tmp_path)

    def kill(step: int) -> None:
        if step == 13:
            for node in ("n2", "n3", "n4", "n5"):
                cluster.kill_node(node)

    lead.notes.on_step = kill
    with lead:
        notes = lead.wait()
    recovery = notes.recoveries[0]
    restored = notes.memberships[1].restored_step
    # The last node may still hold two parts of the very snapshot that was saved last; three are in storage alone.
    assert recovery.source.endswith("storage") and recovery.storage_bytes > 0
    assert restored in (5, 10, 15) and 0 <= recovery.steps_redone < STEPS - restored, "from the newest checkpoint"
    assert notes.worlds[-1] == 1 and [row.step for row in notes.rows] == [*range(1, STEPS + 1)]
    assert_every_sample_of(lead, tmp_path)


def test_storage_gives_only_what_no_keeper_has(uninterrupted, tmp_path):
    """Two of three nodes die at once; the third keeps two of three parts of the snapshot that was saved last."""
    folder, _ = uninterrupted
    config = config_with_ledger(
        tmp_path, scaling=THREE, train={"steps": STEPS}, checkpoint={"every": 10, "snapshot_every": 10}
    )
    cluster = ProcessCluster({"n1": 1, "n2": 1, "n3": 1})
    lead = Lead(config, cluster, tmp_path)

    def kill(step: int) -> None:
        if cluster.nodes.keys() >= {"n2", "n3"} and lead.notes.commits == [10]:
            for node in ("n2", "n3"):
                cluster.kill_node(node)
            cluster.nodes |= {"n4": 1, "n5": 1}

    lead.notes.on_step = kill
    with lead:
        notes = lead.wait()
    (recovery,) = notes.recoveries
    restored = notes.memberships[1].restored_step  # On a busy machine the next one may have been saved by then, too.
    assert recovery.source == "keepers and storage" and restored in (10, 20)
    manifest = lead.log.manifest(restored)
    assert manifest is not None
    # Rank 1's part, once for each of the three that need some of it; never the parts that a keeper has.
    whole = sum(shard.size for shard in manifest.shards)
    assert 0 < recovery.storage_bytes <= 3 * manifest.shards[1].size < 3 * whole
    assert_every_sample_of(lead, tmp_path)
    assert_equal_states(folder, tmp_path)


def test_a_worker_that_dies_while_its_keeper_uploads(uninterrupted, tmp_path):
    """The upload ends, and the checkpoint counts."""
    _, notes = broken_run(
        tmp_path, {"a": 4}, lambda lead: inject(lead, 1, Phase.COMPUTE, 11, "kill"), checkpoint={"every": 10}
    )
    assert len(notes.faults) == 1 and notes.commits == [10, 20, STEPS]


def test_a_poisoned_step_ends_the_run_with_its_cause(tmp_path):
    config = config_of(tmp_path, scaling=THREE, train={"steps": STEPS})
    lead = Lead(config, ProcessCluster({"a": 3}, FaultyMember), tmp_path)

    def poison(*_) -> None:
        for worker in lead.pool.workers.values():
            worker.handle.call("inject", Phase.REDUCE, 11, "raise")

    lead.notes.on_step = lambda step: poison() if step == 8 else None
    lead.notes.on_event = lambda event: threading.Timer(0.0, poison).start()
    with lead, pytest.raises(TrainingError, match="step 11 is poison: it has ended the group 3 times.*a test broke"):
        lead.wait()
    assert lead.notes.rows[-1].step == 10


class _BarrenNode(ProcessCluster):
    """Workers on node `b` die before they are ready."""

    def start_worker(self, slot):
        handle = super().start_worker(slot)
        if self.node_of(slot) == "b":
            handle.kill()
        return handle


def test_a_node_on_which_no_worker_lives_does_not_end_a_healthy_run(tmp_path):
    config = config_of(tmp_path, scaling={"min_workers": 2, "max_workers": 3}, train={"steps": 80})
    lead = Lead(config, _BarrenNode({"a": 2}, FaultyMember), tmp_path)
    lead.notes.on_step = lambda step: lead.cluster.nodes.update(b=1) if step == 8 else None
    with lead:
        notes = lead.wait()
    assert lead.outcome == "finished" and notes.faults == []
    assert [text for text in notes.notices if "it goes on without them, the next try is in 10 s" in text]


@pytest.mark.parametrize("whose", ["a worker", "a worker with no other to take its place"])
def test_a_stop_while_nobody_trains_has_the_keepers_save(uninterrupted, tmp_path, whose):
    """During a long back-off, or while too few workers are there: the last finished step is saved, at once."""
    folder, expected = uninterrupted
    waits = {"free_retries": 0, "backoff_s": 600.0, "max_backoff_s": 600.0} if whose == "a worker" else {}
    # A step that is due for validation, which nobody is left to make.
    train = {"steps": STEPS, "validate_every": 1}
    config = config_with_ledger(tmp_path, scaling=THREE, train=train, recovery=waits, checkpoint={"every": 5})
    cluster = ProcessCluster({"a": 3}, FaultyMember)
    lead = Lead(config, cluster, tmp_path)

    def on_step(step: int) -> None:
        if step == 8:
            if not waits:
                cluster.nodes["a"] = 2
                lead.pool.cluster.start_worker = lambda slot: ProcessHandle(time.sleep, 600)
            inject(lead, 1, Phase.BOUNDARY, 12, "kill", 1)

    lead.notes.on_step = on_step
    with lead:
        told = "trying again in 600 s" if waits else "waiting for 3 worker(s)"
        deadline = time.monotonic() + 60
        while not any(told in notice for notice in lead.notes.notices):
            assert time.monotonic() < deadline and lead.error is None, (lead.notes.notices, lead.error)
            time.sleep(0.01)
        lead.stop.request()
        notes = lead.wait(60)
    assert lead.outcome == "interrupted" and lead.controller.ended_at == 11 == notes.commits[-1]
    config = replace(config, recovery=replace(config.recovery, free_retries=1000))
    with Lead(config, ProcessCluster({"a": 3}), tmp_path) as again:
        notes = again.wait()
    assert [row.step for row in notes.rows] == [*range(12, STEPS + 1)]
    assert [row.loss for row in notes.rows] == [row.loss for row in expected.rows[11:]]
    assert [report.step for report in notes.validations] == [*range(11, STEPS + 1)], "it was made up for"
    assert_equal_states(folder, tmp_path)
