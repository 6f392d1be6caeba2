"""A branch goes on from a step of another run as that run did, whether out of its checkpoint or its keepers' memory."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.load import load
from optim.config import OptimConfig
from orchestrator.config import RunConfig
from orchestrator.living import BranchPoint, Living
from orchestrator.log.run_log import RunLog
from tests.closeness import ADAMW_EPS
from tests.faults import FaultyMember
from tests.leading import Lead, Notes, config_of, tensors_of
from tests.ledger import samples_in_order
from tests.processes import ProcessCluster
from tests.workers import test_llama
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.phases import Phase
from workers.recipe import StageConfig

AT, STEPS = 6, 12
NODES = {"a": 2, "b": 2}


def config_in(folder: Path, workers: int = 2, **train) -> RunConfig:
    config = config_of(
        folder,
        scaling={"min_workers": workers, "max_workers": workers},
        train={"steps": STEPS, "global_batch": 6, "validate_every": 5, **train},
        checkpoint={"every": 2, "keep_last": 1, "at": (AT,)},
        recovery={"hang_s": 120.0},
    )
    return replace(config, data=replace(config.data, ledger=f"{folder}/ledger"))


def llama_in(folder: Path) -> RunConfig:
    optim = OptimConfig(name="adamw", lr=3e-3, eps=ADAMW_EPS, schedule="wsd", warmup_steps=3)
    return replace(config_in(folder, precision="bf16"), model=test_llama.TINY, optim=optim)


def branch_of(config: RunConfig, parent: Path, **train) -> RunConfig:
    train = {"init": f"{parent}/run@{AT}", "init_state": "run", **train}
    return replace(config, train=replace(config.train, **train), checkpoint=replace(config.checkpoint, at=()))


def led(config: RunConfig, folder: Path, **options) -> Notes:
    with Lead(config, ProcessCluster(NODES), folder, **options) as lead:
        return lead.wait()


def differing(one: Path, other: Path) -> list:
    """Return the tensors of two runs' newest checkpoints that are not bitwise the same."""
    first, second = (tensors_of(f"{folder}/run") for folder in (one, other))
    assert first.keys() == second.keys()
    return [key for key, tensor in first.items() if tensor.tobytes() != second[key].tobytes()]


@pytest.fixture(scope="module", params=[config_in, llama_in], ids=["moonlight-muon", "llama-adamw-bf16"])
def parent(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    return folder, request.param, led(request.param(folder), folder)


@pytest.fixture(scope="module")
def muon(tmp_path_factory):
    """A parent, for what does not depend on the model."""
    folder = tmp_path_factory.mktemp("muon")
    return folder, led(config_in(folder), folder)


def test_a_branch_of_the_same_config_is_bitwise_its_parent(parent, tmp_path):
    folder, config_in, whole = parent
    kept = [commit.step for commit in RunLog(Store(f"{folder}/run")).commits]
    assert kept == [AT, STEPS], "the branch point is kept, though but one checkpoint is"
    notes = led(branch_of(config_in(tmp_path), folder), tmp_path)
    assert [row.step for row in notes.rows] == list(range(AT + 1, STEPS + 1))
    assert [(row.loss, row.lr, row.grad_norm, row.tokens) for row in notes.rows] == [
        (row.loss, row.lr, row.grad_norm, row.tokens) for row in whole.rows[AT:]
    ]
    assert [(one.step, one.loss) for one in notes.validations] == [
        (one.step, one.loss) for one in whole.validations if one.step >= AT
    ]
    assert differing(folder, tmp_path) == []
    mine, theirs = (RunLog(Store(f"{one}/run")).manifest() for one in (tmp_path, folder))
    assert mine.counters == theirs.counters and mine.identity == theirs.identity
    (ancestor,) = mine.lineage.ancestors
    assert (ancestor.run_id, ancestor.step, ancestor.url) == (theirs.run_id, AT, f"{folder}/run")


def test_a_branch_with_another_batch_goes_on_at_the_sample_where_its_parent_was(muon, tmp_path):
    """By stages: what is said of the parent's steps is the parent's, and the samples go on, each once."""
    folder, _ = muon
    stages = (
        StageConfig(name="past", steps=AT),
        StageConfig(name="wide", steps=4, global_batch=12, schedule="constant", lr=5e-3),
    )
    notes = led(branch_of(config_in(tmp_path), folder, steps=0, stages=stages), tmp_path)
    assert [row.step_tokens for row in notes.rows] == [12 * 32] * 4 and {row.lr for row in notes.rows} == {5e-3}
    before = samples_in_order(folder / "ledger", range(1, AT + 1))
    after = samples_in_order(tmp_path / "ledger", range(AT + 1, AT + 5))
    calm = samples_in_order(folder / "ledger", range(AT + 1, STEPS + 1))
    assert after[: len(calm)] == calm, "the same order in larger steps"
    assert len(before) == AT * 6 and len(after) == 4 * 12


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: replace(c, model=replace(c.model, num_heads=4)), r"another model:\n  model.num_heads: "),
        (lambda c: replace(c, optim=replace(c.optim, name="adamw")), "takes the optimizer's state along, and .* muon"),
        (lambda c: replace(c, seed=4), r"\n  seed: the checkpoint has 3, the config 4\n"),
        (lambda c: replace(c, train=replace(c.train, seq_len=16)), r"\n  train.seq_len: the checkpoint has 32, "),
        (
            lambda c: replace(c, train=replace(c.train, global_batch=12)),
            r"\n  train.global_batch: .* 6, .* 12\n",
        ),
        (lambda c: replace(c, data=replace(c.data, window=64)), r"\n  data.window: .* None, the config 64\n"),
        (lambda c: replace(c, data=replace(c.data, held_out_fraction=0.3)), r"\n  data: the checkpoint has '"),
        (lambda c: replace(c, train=replace(c.train, steps=AT)), "begins with step 7, and nothing is left to train"),
        (lambda c: replace(c, train=replace(c.train, init=c.train.init[:-1] + "7")), "train.init=.*no committed check"),
    ],
    ids=["model", "optimizer", "seed", "length", "batch", "order", "data", "nothing left", "no such step"],
)
def test_what_is_no_branch_is_refused_by_name(muon, tmp_path, change, told):
    folder, _ = muon
    config = replace(config_in(tmp_path), data=replace(config_in(folder).data, ledger=""))
    with pytest.raises(ConfigError, match=told):
        Lead(change(branch_of(config, folder)), ProcessCluster(NODES), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_balance_of_experts_of_its_own_is_no_other_model(muon, tmp_path):
    folder, whole = muon
    config = branch_of(config_in(tmp_path), folder)
    config = replace(config, model=replace(config.model, router_bias_rate=0.0, init_std=0.5))
    notes = led(config, tmp_path)
    assert notes.losses[0] == whole.losses[AT] and notes.losses[-1] != whole.losses[-1]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("checkpoint.at=[0]", r"checkpoint\.at must be steps, 1 or more, not \[0\]"),
        ("checkpoint.at=[5,2000]", r"checkpoint\.at: step 2000 is behind the last one, 400"),
        ("checkpoint.at=soon", r"checkpoint\.at: must be .* not 'soon'"),
        ("train.init_state=run", r"train\.init_state=run goes on after a step .* as RUN@STEP, not ''"),
        ("train.init_state=once", "train.init_state: must be one of weights, all, run, not 'once'"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(override, told):
    assert load("demo", ["train.steps=400", "checkpoint.at=[5,10]"]).checkpoint.at == (5, 10)
    with pytest.raises(ConfigError, match=told):
        load("demo", ["train.steps=400", override])


class Crash(BaseException):
    """The driver is dead."""


@pytest.mark.parametrize("last", [AT + 1, AT + 4], ids=["before its first checkpoint", "after"])
def test_a_branch_that_was_killed_goes_on(muon, tmp_path, last):
    folder, whole = muon

    def kill(step: int) -> None:
        if step == last:
            for node in list(NODES):
                lead.cluster.kill_node(node)
            raise Crash

    config = branch_of(config_in(tmp_path), folder)
    lead = Lead(config, ProcessCluster(NODES), tmp_path)
    lead.notes.on_step = kill
    with lead, pytest.raises(Crash):
        lead.wait()
    begun = RunLog(Store(f"{tmp_path}/run")).reached
    assert begun == (0 if last == AT + 1 else AT + 2) or begun == AT + 4
    notes = led(config, tmp_path)
    assert notes.losses == whole.losses[STEPS - len(notes.rows) :] and differing(folder, tmp_path) == []


def test_a_fault_in_a_branch_is_recovered_from(muon, tmp_path):
    folder, whole = muon
    lead = Lead(branch_of(config_in(tmp_path), folder), ProcessCluster(NODES, FaultyMember), tmp_path)
    lead.pool.wait(lambda: len(lead.pool.free) == 2, lambda: None, 60)
    next(iter(lead.pool.workers.values())).handle.call("inject", Phase.COMPUTE, AT + 1, "kill").result(10)
    with lead:
        notes = lead.wait()
    assert len(notes.faults) == 1, "in the branch's first step: no snapshot and no checkpoint of its own yet"
    assert notes.losses == whole.losses[AT:] and differing(folder, tmp_path) == []


# -- of a run that still trains ----------------------------------------------------------------------------------------


class Waiting(FaultyMember):
    """A member that waits after the branch point until a file is there."""

    def on_mark(self, phase: Phase, step: int) -> None:
        super().on_mark(phase, step)
        while phase is Phase.COMPUTE and step == STEPS - 1 and not Path(self.gate).exists():
            time.sleep(0.01)

    gate = "/nowhere"

    def wait_for(self, gate: str) -> None:
        self.gate = gate


class Parent:
    """A run that waits before its last step but one; its branches begin meanwhile."""

    def __init__(self, folder: Path, workers: int, branches: int) -> None:
        self.gate, self.folder, self.living = folder / "go on", folder, Living({AT: branches})
        self.lead = Lead(config_in(folder, workers), ProcessCluster(NODES, Waiting), folder, living=self.living)
        self.lead.pool.wait(lambda: len(self.lead.pool.free) == workers, lambda: None, 60)
        for worker in self.lead.pool.workers.values():
            worker.handle.call("wait_for", str(self.gate)).result(10)

    def __enter__(self) -> "Parent":
        self.lead.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.gate.touch()
        self.lead.__exit__(*error)

    def point(self) -> BranchPoint:
        point = self.living.wait(AT, lambda: None)
        assert point is not None and point.in_memory is not None
        return point

    def held(self) -> list:
        keepers = list(self.lead.pool.keepers.values())
        return [shard for keeper in keepers for shard in keeper.handle.call("held", 1, AT).result(10)]


@pytest.mark.parametrize(("workers", "others"), [(1, 2), (2, 1)])
def test_out_of_a_living_runs_memory_it_is_what_it_is_out_of_storage(tmp_path, workers, others):
    """The parent's folder is gone when the branch begins from its memory."""
    stored, living, parent = (tmp_path / name for name in ("stored", "living", "parent"))
    parent.mkdir()
    with Parent(parent, workers, 1) as run:
        point = run.point()
        assert len(run.held()) == workers
        of_storage = led(branch_of(config_in(stored, others), parent), stored)
        shutil.move(parent / "run", parent / "away")
        of_memory = led(
            replace(config_in(living, others), checkpoint=config_of(living).checkpoint), living, branch=point
        )
        shutil.move(parent / "away", parent / "run")
        assert run.held() == [], "the only branch has begun"
    told = [[(one.source, one.storage_bytes > 0) for one in notes.recoveries] for notes in (of_storage, of_memory)]
    assert told == [[("storage", True)], [("keepers", False)]]
    assert of_memory.losses == of_storage.losses and differing(stored, living) == []
    assert any("stay in the keepers' memory" in text for text in run.lead.notes.notices)


def test_what_the_memory_does_not_have_any_more_comes_from_the_checkpoint(muon, tmp_path):
    """A keeper of the parent dies before the first branch, and the parent has ended before the second."""
    _, whole = muon
    first, second, parent = (tmp_path / name for name in ("first", "second", "parent"))
    parent.mkdir()
    with Parent(parent, 2, 3) as run:
        point, later = run.point(), run.point()
        for keeper in run.lead.pool.keepers.values():
            keeper.handle.kill()
        notes = led(config_in(first), first, branch=point)
        assert [fault.kind for fault in notes.faults] == ["error"] and "keeper" in notes.faults[0].cause
        assert notes.recoveries[-1].source == "storage" and notes.losses == whole.losses[AT:]
        run.gate.touch()
        run.lead.wait()
    assert later.in_memory is None and (again := run.living.wait(AT)) is not None and again.in_memory is None
    notes = led(config_in(second), second, branch=later)
    assert notes.faults == [] and notes.recoveries[0].source == "storage" and notes.losses == whole.losses[AT:]


def test_whoever_waits_for_a_step_that_does_not_come_is_told(tmp_path):
    living = Living({AT: 1, STEPS - 2: 1})
    got: list = []
    waiter = threading.Thread(target=lambda: got.append(living.wait(AT)))
    waiter.start()
    with pytest.raises(ConfigError, match=r"checkpoint.at=\[6\]: branches begin after 10, and fall back"):
        living.check(config_in(tmp_path))
    living.end()
    waiter.join(30)
    assert got == [None]
    with pytest.raises(Crash):
        Living({AT: 1}).wait(AT, lambda: (_ for _ in ()).throw(Crash))


def test_a_parent_that_goes_on_behind_a_step_does_not_come_to_it_again(muon):
    folder, _ = muon
    living = Living({AT: 1})
    living.begin(Lead(config_in(folder), ProcessCluster(NODES), folder).pool, STEPS)
    assert living.wait(AT) is None
