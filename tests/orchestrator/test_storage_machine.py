"""Drivers that start, die and come back from the dead, retention, people's commands, readers and damage, in any order.

What is true throughout: a reader never gets a byte that was not written for the checkpoint which it opened, and the
newest checkpoint that is whole is the one that was committed last. `--storage-steps` says how many rules are run.
"""

import random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from orchestrator.log.retention import delete
from orchestrator.log.run_log import Entry, FencedError, RunLog
from tests.crashing import MODES, Crash, CrashingS3, small_parts  # noqa: F401
from tests.orchestrator.test_crash_points import KINDS, URL, Driver, truth
from workers.checkpoint.manifest import Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import DamagedError, StorageError
from workers.common.storage import Store

STEPS_PER_EXAMPLE = 50


class Storage(RuleBasedStateMachine):
    """A run's folder, and everybody who does something to it."""

    def __init__(self) -> None:
        super().__init__()
        self.store = CrashingS3.current = CrashingS3()
        self.drivers: list[Driver] = []
        self.dead: set[int] = set()
        self.loads: list[tuple[Entry, CheckpointReader]] = []
        self.damaged: set[str] = set()
        self.expected: list[str] = []
        """Manifests that count, oldest first."""

    def current(self, number: int) -> Driver:
        return self.drivers[number % len(self.drivers)]

    def sync(self) -> None:
        """What a stopped operation came to is in the store; from now on it is what is expected."""
        self.store.plan, self.store.dead = None, False
        self.expected = [entry.manifest for entry in RunLog(Store(URL)).commits]

    @rule()
    def start_driver(self) -> None:
        try:
            self.drivers.append(Driver())
        except DamagedError as error:  # Everything that there was is damaged: a driver must not start anew.
            assert "is whole" in str(error) and self.damaged

    @precondition(lambda self: self.drivers)
    @rule(number=st.integers(0, 99))
    def save(self, number: int) -> None:
        driver = self.current(number)
        stale = driver is not self.drivers[-1]
        try:
            driver.save()
            assert not stale, "a driver that was overtaken has committed"
            self.expected.append(driver.log.commits[-1].manifest)
        except FencedError:
            assert stale, "the run's driver was fenced"

    @precondition(lambda self: self.drivers)
    @rule(after=st.integers(1, 25), mode=st.sampled_from(MODES))
    def save_and_fail(self, after: int, mode) -> None:
        driver = self.drivers[-1]
        self.store.plan = self.store.operations + after, mode
        before = list(self.expected)
        try:
            driver.save()
        except Crash:
            self.drivers.pop()  # Dead for good; the one before it is stale and alive.
            self.dead.add(driver.attempt)
        except FencedError:
            raise AssertionError("the run's driver was fenced") from None
        except StorageError:
            pass
        self.sync()
        assert self.expected[: len(before)] == before and len(self.expected) <= len(before) + 1
        if driver.attempt in self.dead:
            self.drivers.append(self.replacement())

    def replacement(self) -> Driver:
        """Of a driver that died: otherwise the one before it would be taken for the run's."""
        try:
            return Driver()
        except DamagedError:
            self.store.objects.clear()
            self.expected, self.loads, self.damaged = [], [], set()
            self.drivers.clear()
            return Driver()

    @precondition(lambda self: self.drivers)
    @rule(number=st.integers(0, 99))
    def clean(self, number: int) -> None:
        driver = self.current(number)
        try:
            driver.clean()
            if driver is self.drivers[-1]:
                pinned = driver.log.pins
                self.expected = [m for i, m in enumerate(self.expected) if m in pinned or i == len(self.expected) - 1]
        except FencedError:
            assert driver is not self.drivers[-1]
        found = [entry.manifest for entry in RunLog(Store(URL)).commits]
        assert found == self.expected

    @precondition(lambda self: self.expected)
    @rule(number=st.integers(0, 99), kind=st.sampled_from(["pin", "unpin", "delete"]))
    def person(self, number: int, kind) -> None:
        log = RunLog(Store(URL))
        commit = log.commits[number % len(log.commits)]
        if kind != "delete":
            log.mark(kind, commit, "a person")
        elif commit != log.commits[-1] and delete(log, commit, "a person"):
            self.expected.remove(commit.manifest)

    @precondition(lambda self: self.expected)
    @rule(number=st.integers(0, 99))
    def open(self, number: int) -> None:
        log = RunLog(Store(URL))
        commit = log.commits[number % len(log.commits)]
        try:
            self.loads.append(
                (commit, CheckpointReader(log.store, Manifest.read(log.store, commit.manifest, commit.sha256)))
            )
        except DamagedError:
            assert f"bucket/run/{commit.manifest}" in self.damaged

    @precondition(lambda self: self.loads)
    @rule(number=st.integers(0, 99), kind=st.sampled_from(KINDS))
    def load(self, number: int, kind: str) -> None:
        commit, reader = self.loads[number % len(self.loads)]
        try:
            assert reader.tensor(kind, "w").tobytes() == truth(commit.step).tobytes()
        except DamagedError as error:
            deleted = commit.manifest not in self.expected
            assert deleted or any(shard.path in str(error) for shard in reader.manifest.shards)
            if not deleted:
                assert {f"bucket/run/{shard.path}" for shard in reader.manifest.shards} & self.damaged

    @precondition(lambda self: len(self.expected) > 1)
    @rule(seed=st.integers(0, 2**31))
    def damage(self, seed: int) -> None:
        dice = random.Random(seed)
        paths = sorted(path for path in self.store.objects if "/shards/" in path or "/manifests/" in path)
        path = dice.choice([path for path in paths if path not in self.damaged] or paths)
        if path in self.damaged:
            return  # Twice the same bit would mend it.
        data, at = self.store.objects[path]
        harmed = bytearray(data)
        harmed[dice.randrange(len(harmed))] ^= 1 << dice.randrange(8)
        self.store.objects[path] = bytes(harmed), at
        self.damaged.add(path)

    @invariant()
    def the_newest_whole_checkpoint_is_the_last_commit(self) -> None:
        log = RunLog(Store(URL))
        assert log.damaged == [] and [entry.manifest for entry in log.commits] == self.expected
        whole = [manifest for manifest in self.expected if f"bucket/run/{manifest}" not in self.damaged]
        if whole:
            assert log.newest_good().path == whole[-1]


def test_in_any_order(request):
    steps = request.config.getoption("--storage-steps")
    profile = settings(
        max_examples=max(1, steps // STEPS_PER_EXAMPLE),
        stateful_step_count=STEPS_PER_EXAMPLE,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Storage, settings=profile)
