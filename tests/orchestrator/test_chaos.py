"""Random faults, hundreds of them with `make chaos` and twenty in `make test`, over real processes without Ray.

The seed is printed; `--chaos-seed` repeats it.
"""

import random
import threading
from dataclasses import replace

import pytest

from orchestrator.record.events import Event, Fault, Membership
from tests.faults import ACTIONS, FaultyMember
from tests.leading import Lead, Notes, config_of
from tests.orchestrator.test_recovery import assert_equal_states, assert_every_sample_of, config_with_ledger
from tests.processes import ProcessCluster
from workers.phases import Phase

PHASES = [p for p in Phase if Phase.COMPUTE.order <= p.order <= Phase.AGREE.order and not p.patient]
FAULTS_PER_RUN = 10
STEPS_BETWEEN = 6
"""So that no step is hit three times: that would be poison."""


class Chaos:
    """Breaks something every few steps; whatever is broken recovers before the next thing is."""

    def __init__(self, lead: Lead, seed: int, faults: int, steps: int, spare_keepers: bool) -> None:
        self.lead, self.random = lead, random.Random(seed)
        self.plan = [4 + STEPS_BETWEEN * i for i in range(faults)]
        assert self.plan[-1] + STEPS_BETWEEN < steps
        self.spare_keepers = spare_keepers
        self.done: list[str] = []
        self.again = False
        lead.notes.on_step, lead.notes.on_event = self.on_step, self.on_event

    def on_step(self, step: int) -> None:
        # Rows may come out of a group that has just lost somebody; the next one is there soon.
        whole = all(number in self.lead.pool.workers for number in self.lead.controller.generation.members)
        if self.plan and step >= self.plan[0] and whole:
            self.plan.pop(0)
            kind = self.random.choices(("member", "recovery", "keeper", "outside"), (6, 2, 1, 2))[0]
            if kind == "keeper" and self.spare_keepers:
                kind = "member"
            getattr(self, kind)(step)
            print(self.done[-1], flush=True)

    def on_event(self, event: Event) -> None:
        """A second fault, while the group recovers from the first."""
        print(event, flush=True)
        if isinstance(event, Fault) and self.again:
            self.again = False
            threading.Timer(self.random.random() * 0.3, self.kill_somebody).start()

    def member(self, step: int) -> None:
        """A worker breaks by itself, at a certain place."""
        rank = self.random.randrange(len(self.lead.controller.generation.members))
        phase, action = self.random.choice(PHASES), self.random.choice(ACTIONS)
        self.done.append(f"rank {rank}: {action} at {phase.value}, from step {step + 1} on")
        self.worker(rank).handle.call("inject", phase, step + 1, action, self.random.randint(1, 2))

    def recovery(self, step: int) -> None:
        """A worker dies, and another one while the group recovers."""
        self.again = True
        self.member(step)
        self.done[-1] += ", and another one during recovery"

    def keeper(self, step: int) -> None:
        """A keeper dies."""
        node = self.random.choice(sorted(self.lead.pool.keepers))
        self.done.append(f"step {step}: keeper of {node} killed")
        self.lead.pool.keepers[node].handle.kill()

    def outside(self, step: int) -> None:
        """A worker is killed from outside, wherever it is."""
        self.done.append(f"step {step}: a worker killed from outside")
        threading.Timer(self.random.random() * 0.2, self.kill_somebody).start()

    def kill_somebody(self) -> None:
        workers = [worker for worker in list(self.lead.pool.workers.values()) if worker.ready]
        if workers:
            self.random.choice(workers).handle.kill()

    def worker(self, rank: int):
        return self.lead.pool.workers[self.lead.controller.generation.members[rank]]


def chaotic_run(folder, nodes, scaling, seed, faults, **changes) -> Chaos:
    steps = 4 + STEPS_BETWEEN * (faults + 1) + 4
    settings = {"steps": steps, **changes.pop("train", {})}
    recovery = {"hang_s": 3.0, "max_in_a_row": 1000, "poison_after": 6}
    config = config_with_ledger(folder, scaling=scaling, train=settings, recovery=recovery, **changes)
    lead = Lead(config, ProcessCluster(nodes, FaultyMember), folder)
    chaos = Chaos(lead, seed, faults, steps, spare_keepers=len(nodes) == 1)
    with lead:
        notes = lead.wait(600)
    for name, text in notes.stacks.items():
        print(name, text)
    print(f"{len(notes.faults)} faults seen, {len(notes.recoveries)} recoveries")
    assert lead.outcome == "finished" and len(chaos.done) == faults
    assert [row.step for row in notes.rows] == [*range(1, config.train.steps + 1)]
    assert_every_sample_of(lead, folder)
    return chaos


@pytest.fixture
def rounds(request) -> int:
    return max(1, request.config.getoption("--chaos-faults") // (2 * FAULTS_PER_RUN))


@pytest.fixture
def per_run(request) -> int:
    return min(FAULTS_PER_RUN, request.config.getoption("--chaos-faults") // 2)


def undisturbed(folder, **changes):
    config = config_of(folder, **changes)
    with Lead(config, ProcessCluster({"a": config.scaling.max_workers}), folder) as lead:
        return lead.wait()


def test_at_a_fixed_world_size_chaos_leaves_no_trace(tmp_path, seed, rounds, per_run):
    scaling = {"min_workers": 3, "max_workers": 3, "standby": 1}
    steps = 4 + STEPS_BETWEEN * (per_run + 1) + 4
    calm = tmp_path / "calm"
    expected = undisturbed(calm, scaling={**scaling, "standby": 0}, train={"steps": steps}, checkpoint={"every": 7})
    for round_ in range(rounds):
        folder = tmp_path / f"round-{round_}"
        nodes = {"a": 5} if round_ % 2 else {"a": 3, "b": 2}
        chaos = chaotic_run(folder, nodes, scaling, seed + round_, per_run, checkpoint={"every": 7})
        notes = chaos.lead.notes
        assert [row.loss for row in notes.rows] == [row.loss for row in expected.rows]
        assert_equal_states(calm, folder)
        assert {member.world_size for member in notes.memberships} == {3}


@pytest.mark.numeric
def test_where_the_world_size_changes_the_curve_stays(tmp_path, seed, rounds, per_run):
    """A dense twin's losses stay within 1e-3 of the undisturbed run's all along; its gradients are in parts."""
    dense = {"model": replace(config_of(tmp_path).model, num_dense_layers=config_of(tmp_path).model.num_layers)}
    scaling = {"min_workers": 1, "max_workers": 4}
    steps = 4 + STEPS_BETWEEN * (per_run + 1) + 4
    train = {"gradients": "partitioned", "recompute": "1"}
    expected = undisturbed(tmp_path / "calm", scaling=scaling, train={"steps": steps, **train}, **dense)
    for round_ in range(rounds):
        folder = tmp_path / f"round-{round_}"
        nodes = {"a": 2, "b": 2, "c": 1}
        chaos = chaotic_run(
            *(folder, nodes, scaling, seed + 1000 + round_, per_run), checkpoint={"every": 7}, train=train, **dense
        )
        notes = chaos.lead.notes
        for row, calm in zip(notes.rows, expected.rows, strict=True):
            assert row.loss == pytest.approx(calm.loss, rel=1e-3), row.step
        assert_first_change_is_smooth(notes, expected)
        sizes = [event.world_size for event in notes.events if isinstance(event, Membership)]
        print("world sizes:", *sizes)


def assert_first_change_is_smooth(notes: Notes, calm: Notes) -> int:
    """Up to the first change of the world size both runs have the same state: its first loss is within 1e-5."""
    changed = next(m.restored_step for m in notes.memberships[1:] if m.world_size != m.previous_world_size)
    assert notes.losses[:changed] == calm.losses[:changed]
    assert notes.losses[changed] == pytest.approx(calm.losses[changed], rel=1e-5)
    return changed


def test_a_mixture_of_experts_ends_as_well(tmp_path, seed, rounds, per_run):
    """Expert choices flip at a rounding: close for 50 steps after the first change, and as good at the end."""
    if rounds < 2:
        pytest.skip("not run: behind make chaos")
    scaling = {"min_workers": 1, "max_workers": 4}
    steps = {"steps": 4 + STEPS_BETWEEN * (FAULTS_PER_RUN + 1) + 60, "validate_sequences": 32}
    calm = []
    for other in range(3):
        config = replace(config_of(tmp_path, scaling=scaling, train=steps), seed=3 + other)
        with Lead(config, ProcessCluster({"a": 4}), tmp_path / f"calm-{other}") as lead:
            calm.append(lead.wait())
    finals = [notes.validations[-1].loss for notes in calm]
    notes = chaotic_run(tmp_path / "chaos", {"a": 2, "b": 3}, scaling, seed, FAULTS_PER_RUN, train=steps).lead.notes
    changed = assert_first_change_is_smooth(notes, calm[0])
    for row, undisturbed_row in zip(notes.rows[: changed + 50], calm[0].rows, strict=False):
        assert row.loss == pytest.approx(undisturbed_row.loss, rel=1e-3), (row.step, changed)
    assert abs(notes.validations[-1].loss - finals[0]) <= max(finals) - min(finals), (notes.validations[-1], finals)
