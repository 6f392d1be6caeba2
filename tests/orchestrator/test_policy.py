"""The decisions of the worker group, without any process."""

import pytest

from orchestrator.config import RecoveryConfig, ScalingConfig
from orchestrator.policy import (
    Candidate,
    FailurePolicy,
    GiveUp,
    GoOn,
    backoff,
    buddies,
    choose_members,
    diagnose,
    lacks_memory,
    newest_snapshot,
    restart,
    same_failure,
    should_grow,
)
from orchestrator.resumption import check_steps
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError, StorageError, TrainingError
from workers.common.wire import Address
from workers.member import settings_behind
from workers.reports import Ended
from workers.snapshots.kept import KeptShard
from workers.snapshots.region import RegionSize


def candidates(text: str) -> list[Candidate]:
    """`a1 b2`: worker 1 on node a, worker 2 on node b."""
    return [Candidate(int(word[1:]), word[0]) for word in text.split()]


@pytest.mark.parametrize(
    ("ready", "members", "expected"),
    [
        ("a1 b2 a3", [], [1, 3, 2]),  # Node by node.
        ("a1 b2 a3 b4", [], [1, 3, 2]),  # The newest stands by.
        ("a1 a3 b4", [1, 2, 3], [1, 3, 4]),  # The standby takes the dead one's place.
        ("b4 b5 a1", [5, 1], [1, 4, 5]),
        ("a1 a2 b3 b4", [2, 3, 4], [2, 3, 4]),  # Members stay, though an older worker is there.
        ("a1", [1, 2, 3], None),
    ],
)
def test_members_stay_and_the_oldest_come(ready, members, expected):
    scaling = ScalingConfig(min_workers=2, max_workers=3, standby=1)
    assert choose_members(candidates(ready), members, scaling) == expected


def test_growth_waits_for_newcomers_that_are_about_to_be_ready():
    scaling = ScalingConfig(min_workers=1, max_workers=4, settle_s=5)
    assert not should_grow(2, 0, 1, 0.0, scaling), "nobody to take in"
    assert not should_grow(4, 1, 0, 9.0, scaling), "full"
    assert should_grow(2, 1, 0, 0.0, scaling), "nobody else is coming"
    assert not should_grow(2, 1, 1, 4.9, scaling) and should_grow(2, 1, 1, 5.0, scaling)
    assert should_grow(2, 2, 1, 0.0, scaling), "enough for all places"


def test_buddies_form_a_ring():
    assert buddies(["b", "a", "a", "c"]) == {"a": "b", "b": "c", "c": "a"}
    assert buddies(["a", "a"]) == {"a": None} and buddies([]) == {}


def kept(generation: int, step: int, rank: int, world_size: int, agreed: bool = True) -> KeptShard:
    return KeptShard(
        generation=generation,
        rank=rank,
        world_size=world_size,
        step=step,
        agreed=agreed,
        keeper=Address("host", 1, "secret"),
        path="",
        half=0,
        size=RegionSize(4, 4),
        notes={"counters": {"step": step}, "rows": []} if agreed else {},
    )


NEVER = (0, -1)


def test_a_step_counts_when_every_rank_sealed_it_and_any_saw_the_boundary():
    old = [kept(1, 7, 0, 2), kept(1, 7, 1, 2)]
    assert newest_snapshot([], NEVER) is None
    assert newest_snapshot([*old, kept(1, 8, 0, 2)], NEVER).step == 7, "rank 1's part of step 8 is missing"
    assert newest_snapshot([*old, kept(1, 8, 0, 2), kept(1, 8, 1, 2, agreed=False)], NEVER).step == 8
    torn = [kept(1, 8, 0, 2, agreed=False), kept(1, 8, 1, 2, agreed=False)]
    assert newest_snapshot([*old, *torn], NEVER).step == 7, "nobody knows whether step 8 was finished"


def test_an_older_generation_is_a_past_that_was_given_up():
    given_up = [kept(1, 9, 0, 2), kept(1, 9, 1, 2)]
    assert newest_snapshot([*given_up, kept(2, 8, 0, 1)], NEVER).generation == 2
    found = newest_snapshot([*given_up, kept(2, 8, 0, 2)], NEVER)
    assert (found.generation, found.step) == (1, 9), "the new generation has nothing whole yet"


def test_copies_of_one_rank_do_not_make_up_for_another():
    assert newest_snapshot([kept(1, 7, 0, 2), kept(1, 7, 0, 2)], NEVER) is None


def test_what_no_keeper_has_is_in_storage_if_this_very_snapshot_was_saved():
    left = [kept(2, 7, 0, 2), kept(2, 8, 0, 2)]
    found = newest_snapshot(left, (2, 7))
    assert (found.step, found.saved) == (7, True)
    assert newest_snapshot(left, (1, 7)) is None, "that checkpoint is of a past that was given up"
    assert newest_snapshot(left, (2, 6)) is None
    assert newest_snapshot([kept(2, 7, 0, 2, agreed=False)], (2, 7)) is None, "the rows are in agreed copies alone"
    assert not newest_snapshot([kept(2, 7, 0, 2), kept(2, 7, 1, 2)], (2, 7)).saved, "all in memory"


@pytest.mark.parametrize(
    ("snapshot", "checkpoint", "expected"),
    [
        (None, None, ("start", 0)),
        (None, 6, ("storage", 6)),
        (7, None, ("keepers", 7)),
        (7, 6, ("keepers", 7)),
        (7, 7, ("keepers", 7)),
        (7, 8, ("storage", 8)),
    ],
)
def test_what_is_newer_is_gone_on_from_and_memory_before_storage(snapshot, checkpoint, expected):
    found = snapshot and newest_snapshot([kept(1, snapshot, 0, 1)], NEVER)
    manifest = checkpoint and Manifest("run", 1, 1, checkpoint, 1, {}, {}, {}, ())
    begin = restart(found, manifest)
    assert (begin.source, begin.step) == expected and (begin.snapshot is None) == (expected[0] != "keepers")


def test_a_snapshot_of_which_storage_has_a_part_says_so():
    found = newest_snapshot([kept(2, 7, 0, 2)], (2, 7))
    assert restart(found, Manifest("run", 1, 1, 7, 1, {}, {}, {}, ())).source == "keepers and storage"


def ended(rank: int, time: float, outcome: str = "lost", error: str = "a peer is gone", code: int = 0) -> Ended:
    return Ended(generation=1, rank=rank, time=time, outcome=outcome, error=error, exit_code=code)


def test_the_cause_is_told_from_what_it_led_to():
    nodes = ["node-a", "node-b", "node-c"]
    ends = {1: ended(1, 5.0), 2: ended(2, 4.0)}
    alone = diagnose(ends, {}, nodes, 9.0)
    assert (alone.seen, alone.ranks, alone.began, alone.error) == ("lost", (2,), 4.0, None)
    killed = diagnose(ends, {0: "its process died"}, nodes, 9.0)
    assert (killed.seen, killed.ranks, killed.began) == ("killed", (0,), 9.0)
    assert killed.cause == "rank 0 on node node-a: its process died"
    raised = diagnose({**ends, 0: ended(0, 3.0, "failed", "KeyError: 'x'")}, {1: "it was killed"}, nodes, 9.0)
    assert (raised.seen, raised.cause, raised.kind, raised.error) == ("error", "rank 0: KeyError: 'x'", "failure", None)
    data = diagnose({0: ended(0, 3.0, "failed", "no such bucket", StorageError.exit_code)}, {}, nodes, 9.0)
    assert data.kind == "storage" and data.error is None, "storage comes back"
    nan = diagnose({0: ended(0, 3.0, "failed", "x"), 1: ended(1, 4.0, "failed", "nan", 4)}, {}, nodes, 9.0)
    assert isinstance(nan.error, TrainingError) and str(nan.error) == "rank 1: nan", "what cannot be mended comes first"
    keeper = diagnose({}, {}, nodes, 9.0)
    assert (keeper.seen, keeper.ranks, keeper.began) == ("lost", (), 9.0)


def test_faults_come_out_of_budgets_of_their_own():
    policy = FailurePolicy(RecoveryConfig(max_failures=2, max_preemptions=1, max_storage_failures=1, free_retries=9))
    assert isinstance(policy.fault("failure", "a worker died", 0.0), GoOn)
    assert isinstance(policy.fault("preemption", "spot", 1.0), GoOn)
    assert isinstance(policy.fault("storage", "disk full", 2.0), GoOn)
    assert isinstance(policy.fault("failure", "a worker died", 3.0), GoOn)
    over = policy.fault("failure", "rank 1 died", 4.0)
    assert isinstance(over, GiveUp) and isinstance(over.error, TrainingError)
    assert str(over.error) == "rank 1 died; 3 failures within an hour are more than recovery.max_failures=2"
    storage = policy.fault("storage", "disk full", 5.0)
    assert isinstance(storage, GiveUp) and isinstance(storage.error, StorageError)
    assert "recovery.max_storage_failures=1" in str(storage.error)


def test_an_hour_later_the_budget_is_whole_again():
    policy = FailurePolicy(RecoveryConfig(max_failures=1, free_retries=9))
    assert isinstance(policy.fault("failure", "x", 0.0), GoOn)
    assert isinstance(policy.fault("failure", "x", 3599.0), GiveUp)
    policy = FailurePolicy(RecoveryConfig(max_failures=1, free_retries=9))
    policy.fault("failure", "x", 0.0)
    assert isinstance(policy.fault("failure", "x", 3601.0), GoOn)


def test_without_progress_each_wait_is_twice_the_last():
    config = RecoveryConfig(max_failures=-1, free_retries=1, backoff_s=1, max_backoff_s=5, max_in_a_row=7)
    policy = FailurePolicy(config, stepped=True)
    delays = [policy.fault("failure", "x", float(i)).delay_s for i in range(6)]
    assert delays == [0, 1, 2, 4, 5, 5]
    policy.progressed()
    assert policy.fault("failure", "x", 7.0).delay_s == 0
    for i in range(6):
        policy.fault("failure", "x", 8.0 + i)
    assert isinstance(policy.fault("failure", "x", 20.0), GiveUp)


def test_a_step_that_kills_three_times_is_poison():
    policy = FailurePolicy(RecoveryConfig(max_failures=-1, free_retries=99), stepped=True)
    for at in range(2):
        assert isinstance(policy.fault("failure", "rank 0: boom", float(at), step=12), GoOn)
        assert isinstance(policy.fault("failure", "rank 0: boom", float(at)), GoOn), "while recovering: no step's fault"
        assert isinstance(policy.fault("preemption", "spot", float(at), step=12), GoOn)
    verdict = policy.fault("failure", "rank 0: boom", 3.0, step=12)
    assert isinstance(verdict, GiveUp) and verdict.error.exit_code == 4
    assert "step 12 is poison: it has ended the group 3 times, the last time by rank 0: boom" in str(verdict.error)


GLOO = "rank {}: RuntimeError: [enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: ib0"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GLOO.format(0), GLOO.format(1)),
        (
            "rank 0: DistBackendError: Connection closed by peer [10.0.0.7]:43112 after 12.5 s",
            "rank 3: DistBackendError: Connection closed by peer [10.0.0.9]:999 after 0.1 s",
        ),
        ("rank 1: RuntimeError: peer [::ffff:127.0.0.1]:5", "rank 1: RuntimeError: peer [fe80::1:2]:61234"),
        ("rank 0: OSError: 0x7f00ab id 0123456789abcdef0123", "rank 0:  OSError: 0x1 id fedcba98765432100000"),
    ],
)
def test_ranks_addresses_and_numbers_make_no_other_failure(one, other):
    assert same_failure(one) == same_failure(other)


def test_other_texts_and_other_nodes_are_other_failures():
    texts = (
        GLOO,
        "rank 0: KeyError: 'x'",
        "rank 0 on node aaaa: its process died",
        "rank 0 on node bbbb: its process died",
    )
    assert len(set(map(same_failure, texts))) == 4


def verdicts(policy: FailurePolicy, *causes: str, step: int | None = None) -> list[str]:
    """Return the end's text, or nothing, for each cause."""
    found = [policy.fault("failure", cause, float(at), step) for at, cause in enumerate(causes)]
    return [str(one.error) if isinstance(one, GiveUp) else "" for one in found]


@pytest.mark.parametrize("step", [None, 1])
def test_the_same_failure_three_times_before_any_step_ends_the_run_with_its_cause(step):
    policy = FailurePolicy(RecoveryConfig())
    first, second, third = verdicts(policy, GLOO.format(0), GLOO.format(1), GLOO.format(0), step=step)
    assert not first and not second
    assert third.startswith(f"the same failure 3 times before any step: {GLOO.format(0)}; ")
    assert isinstance(policy.fault("failure", GLOO.format(7), 9.0), GiveUp)
    told = verdicts(FailurePolicy(RecoveryConfig()), *["rank 0 on node aaaa: its process died"] * 3)
    assert "lacks memory kills like that" in told[2]


def test_other_failures_do_not_add_up_and_a_step_ends_the_count():
    policy = FailurePolicy(RecoveryConfig(max_failures=-1))
    assert verdicts(policy, "rank 0: a", "rank 1: b", "rank 0: a", "rank 1: b", "rank 1: c") == [""] * 5
    policy.progressed()
    assert verdicts(policy, *["rank 0: a"] * 10) == [""] * 10, "from then on the budgets are what counts"


@pytest.mark.parametrize(
    "text",
    [
        "rank 0: RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ": you tried to allocate {} bytes. Error code 12 (Cannot allocate)",
        "rank 0: OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB.",
        "rank 0: MemoryError",
        "rank 0: _ArrayMemoryError: Unable to allocate {} GiB for an array",
        "rank 0: RuntimeError: std::bad_alloc",
        "rank 0: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "rank 0 on node aaaa: out of memory: Ray has killed its process, as its node had hardly any left",
        "rank 0: OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_memory_that_is_refused_is_asked_for_once_more_and_without_a_pause(text):
    policy = FailurePolicy(RecoveryConfig())
    assert policy.fault("failure", text.format(12), 0.0) == GoOn(0.0)
    end = policy.fault("failure", text.format(13), 1.0)
    assert isinstance(end, GiveUp) and isinstance(end.error, TrainingError)
    assert "the same failure 2 times before any step" in str(end.error) and "raymuon plan" in str(end.error)


def test_what_has_nothing_to_do_with_memory_is_not_taken_for_it():
    assert not any(map(lacks_memory, (GLOO, "rank 0: KeyError: 'memory'", "rank 0 on node a: its process died")))


def test_a_back_off_doubles_up_to_its_limit_however_often():
    assert [backoff(1.0, 60.0, times) for times in (0, 1, 3, 6, 5000)] == [1.0, 2.0, 8.0, 60.0, 60.0]


def test_the_settings_behind_an_error_are_named():
    environment = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "i", "HOME": "ib0", "NCCL_IB_HCA": "b0"}
    assert settings_behind(GLOO, environment) == " (GLOO_SOCKET_IFNAME=ib0 in the worker's environment)"
    assert settings_behind("rank 0: KeyError", environment) == ""


@pytest.mark.parametrize(
    ("reached", "steps", "finished", "told"),
    [
        (0, 1, False, ""),
        (169, 170, False, ""),
        (169, 170, True, ""),  # A finished run may be trained further.
        (169, 169, False, "no step is left, only its end is made good"),  # Its driver may have died before it was told.
        (169, 169, True, ConfigError("run abc is finished, at step 169; to train it further")),
        (169, 60, False, ConfigError("run abc has come to step 169, and train.steps=60 is before that")),
        (169, 60, True, ConfigError("run abc has come to step 169, and train.steps=60 is before that")),
    ],
)
def test_a_run_is_not_trained_backwards_nor_finished_twice(reached, steps, finished, told):
    if isinstance(told, ConfigError):
        with pytest.raises(ConfigError, match=str(told)) as refusal:
            check_steps("abc", reached, steps, finished)
        assert "train.steps=N with N > 169, or a further stage; or begin a new run" in str(refusal.value)
    else:
        text = check_steps("abc", reached, steps, finished)
        assert told in text and bool(told) == bool(text)
