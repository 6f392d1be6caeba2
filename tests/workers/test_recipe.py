import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.checks import ConfigProblems
from optim.config import OptimConfig
from workers.data.config import DataConfig, MixtureConfig, SourceConfig
from workers.recipe import Recipe, StageConfig, TrainConfig

OPTIM = OptimConfig(lr=1e-3, warmup_steps=10, final_lr_fraction=0.1)


def recipe(*stages: StageConfig, optim: OptimConfig = OPTIM, **train) -> Recipe:
    return Recipe(TrainConfig(stages=stages, **{"global_batch": 8, "micro_batch": 4, **train}), optim)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_run_without_stages_has_the_rates_that_it_had_before_there_were_any(schedule):
    """Bit by bit: a run that goes on does not jump."""
    optim = replace(OPTIM, schedule=schedule)
    found = recipe(steps=100, optim=optim)
    for step in range(1, 101):
        if step <= 10:
            expected = 1e-3 * step / 10
        else:
            share = {
                "cosine": 0.5 * (1 + math.cos(math.pi * ((step - 10) / 90))),
                "linear": 1.0 - (step - 10) / 90,
                "wsd": min(1.0, max(0, 100 - step) / (0.2 * 100)),
                "constant": 1.0,
            }[schedule]
            expected = 1e-3 if schedule == "constant" else 1e-3 * (0.1 + (1 - 0.1) * share)
        assert found.learning_rate(step) == expected, step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_stages_that_say_nothing_are_the_run_without_them(schedule):
    optim = replace(OPTIM, schedule=schedule)
    whole = recipe(steps=100, optim=optim)
    cut = recipe(*(StageConfig(name=str(steps), steps=steps) for steps in (1, 32, 67)), optim=optim)
    for step in range(1, 101):
        assert cut.learning_rate(step) == whole.learning_rate(step)
        assert cut.samples_before(step) == whole.samples_before(step) == 8 * (step - 1)


def test_a_curve_goes_its_way_by_samples_where_the_batch_doubles():
    grown = recipe(
        StageConfig(name="small", steps=40, schedule="cosine", lr=1e-3, final_lr=1e-4, warmup_steps=4),
        StageConfig(name="large", steps=30, global_batch=16),
    )
    for step in (*range(1, 41), *range(41, 71)):
        samples = 8 * step if step <= 40 else 8 * 40 + 16 * (step - 40)
        total, warmup = 8 * 40 + 16 * 30, 4 * 8
        rate = 1e-3 * samples / warmup
        if samples > warmup:
            rate = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (samples - warmup) / (total - warmup)))
        assert grown.learning_rate(step) == pytest.approx(rate, rel=1e-12)
    assert grown.learning_rate(70) == pytest.approx(1e-4)


def test_a_stage_begins_where_the_one_before_ended_or_at_its_own_rate():
    found = recipe(
        StageConfig(name="rise", steps=10, schedule="linear", lr=0, final_lr=4e-4),
        StageConfig(name="fall", steps=10, schedule="cosine", final_lr=4e-5),
        StageConfig(name="again", steps=10, schedule="linear", lr=1e-4, warmup_steps=5),
        StageConfig(name="flat", steps=4, schedule="constant", lr=2e-5),
        StageConfig(name="on", steps=4, schedule="wsd", final_lr=1e-5, decay_fraction=0.5),
    )
    rates = [found.learning_rate(step) for step in range(1, 39)]
    assert rates[:10] == pytest.approx([4e-5 * step for step in range(1, 11)])
    assert rates[14] == pytest.approx((4e-4 + 4e-5) / 2) and rates[19] == pytest.approx(4e-5)
    assert rates[20:25] == pytest.approx([4e-5 + 6e-5 * step / 5 for step in range(1, 6)])
    assert rates[25:30] == pytest.approx([8e-5, 6e-5, 4e-5, 2e-5, 0.0], abs=1e-18)
    assert rates[30:34] == [2e-5] * 4
    assert rates[34:] == pytest.approx([2e-5, 2e-5, 1.5e-5, 1e-5])


def test_what_a_stage_does_not_say_is_as_before():
    found = recipe(
        StageConfig(name="a", steps=2),
        StageConfig(name="b", steps=3, global_batch=16, router_bias_rate=1e-2, weights={"y": 1.0}),
        StageConfig(name="c", steps=4),
        StageConfig(name="d", steps=5, global_batch=4, router_bias_rate=0.0, weights={"x": 1.0, "y": 3.0}),
    )
    assert [(one.first, one.last, one.global_batch, one.router_bias_rate) for one in found.stages] == [
        (1, 2, 8, None),
        (3, 5, 16, 1e-2),
        (6, 9, 16, 1e-2),
        (10, 14, 4, 0.0),
    ]
    data = DataConfig(sources=tuple(SourceConfig(name=name, urls=("u",)) for name in "xy"))
    assert found.mixtures(data) == [(1, (1, 1)), (3, (0, 1)), (10, (1, 3))]
    assert [found.at(step).name for step in (0, 1, 2, 3, 14, 15)] == ["a", "a", "a", "b", "d", "d"]


def test_a_source_gives_a_step_its_share_at_most():
    """And one that no stage gives a weight nothing, however large the batch."""
    data = DataConfig(sources=tuple(SourceConfig(name=name, urls=("u",)) for name in "xyz"))
    some, more = {"x": 1.0}, {"x": 1.0, "y": 3.0}
    stages = StageConfig(name="a", steps=2, weights=some), StageConfig(name="b", steps=2, global_batch=16, weights=more)
    last = StageConfig(name="c", steps=1, global_batch=64, weights={"x": 63.0, "y": 1.0})
    assert recipe(*stages).drawn(data) == [8, 12, 0]
    assert recipe(*stages, last).drawn(data) == [63, 12, 0]
    mixed = replace(data, mixture=(MixtureConfig(step=3, weights={"z": 1}), MixtureConfig(step=9, weights=some)))
    grown = StageConfig(name="a", steps=2), StageConfig(name="b", steps=2, global_batch=16)
    assert recipe(*grown).drawn(mixed) == [3, 3, 16]
    assert recipe(steps=4).drawn(DataConfig()) == [8]


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0, 4, 8, 12, 64])), min_size=1, max_size=6))
def test_every_sample_has_one_step(stages):
    made = [StageConfig(name=str(i), steps=steps, global_batch=batch) for i, (steps, batch) in enumerate(stages)]
    found, sample, step, batch = recipe(*made), 0, 0, 8
    for steps, size in stages:
        batch = size or batch
        for _ in range(steps):
            step += 1
            assert found.samples_before(step) == sample
            sample += batch
    assert found.samples_before(step + 1) == sample
    lasts = [stage.last for stage in found.stages]
    assert lasts[-1] == step and all(b.first == a + 1 for a, b in zip(lasts, found.stages[1:], strict=False))


def test_a_length_in_tokens_is_the_nearest_number_of_steps():
    train = TrainConfig(tokens=10_500, seq_len=256, global_batch=8, micro_batch=4)
    assert train.steps == 5  # of 2,048 tokens
    train = TrainConfig(
        seq_len=256,
        micro_batch=4,
        global_batch=8,
        tokens=20_000,
        stages=(
            StageConfig(name="a", tokens=9_500),
            StageConfig(name="b", tokens=10_500, global_batch=16),
        ),
    )
    assert (train.lengths, train.batches, train.ends, train.steps) == ((5, 3), (8, 16), (5, 8), 8)
    assert TrainConfig().steps == 1000


def test_borders_are_validated():
    train = TrainConfig(
        validate_every=4,
        micro_batch=4,
        stages=(
            StageConfig(name="a", steps=5),
            StageConfig(name="b", steps=3),
            StageConfig(name="c", steps=2),
        ),
    )
    assert [step for step in range(11) if train.validates(step)] == [0, 4, 5, 8, 10]
    for every in (0, 1, 3, 4, 7, 100):
        one = replace(train, validate_every=every)
        assert one.validations == sum(one.validates(step) for step in range(one.steps + 1))


@pytest.mark.parametrize(
    ("train", "stages", "told"),
    [
        ({}, [{}], "steps must be 1 or more, or else tokens be given, not steps=0 and tokens=0"),
        ({}, [{"steps": 3, "tokens": 100}], "not steps=3 and tokens=100"),
        ({}, [{"tokens": 100}], "stages[0].tokens=100 are not even half of one step's 2,048"),
        ({"tokens": 100.0}, [], "tokens=100 are not even half of one step's 2,048"),
        ({"steps": 7}, [{"steps": 3}], "steps must be left out (0), as the 1 stages come to 3, or be that, not 7"),
        ({"steps": 7, "tokens": 4096}, [], "steps must be left out (0), as 4,096 tokens are 2, or be that, not 7"),
        (
            {"tokens": 9e3},
            [{"steps": 3}],
            "tokens must be what the stages come to, 6,144, or be left out (0), not 9,000",
        ),
        ({}, [{"steps": 3, "global_batch": 6}], "stages[0].global_batch must be a multiple of micro_batch (4), not 6"),
        ({}, [{"steps": 3, "name": "x"}, {"steps": 3, "name": "x"}], "x is there more than once"),
        (
            {},
            [{"steps": 3, "name": "x-1"}, {"steps": 3, "name": "x.1"}],
            "x-1, x.1 is there more than once, . and - being",
        ),
        ({}, [{"steps": 3, "name": "x y"}], "name must be of letters, digits, -, _ and ., not 'x y'"),
        ({}, [{"steps": 3, "lr": 1e-3}], "lr needs a schedule of this stage's own"),
        ({}, [{"steps": 3, "lr": 0, "schedule": "cosine"}], "lr=0 is a rise from 0: it needs schedule=linear"),
        ({}, [{"steps": 3, "final_lr": 1e-3, "schedule": "constant"}], "is nothing that a constant rate comes to"),
        ({}, [{"steps": 3, "lr": -2, "schedule": "linear"}], "lr must be -1 (as before), or 0 to 1, not -2"),
        ({}, [{"steps": 3, "weights": {"a": 0}}], "weights must have one above 0"),
        (
            {},
            [{"steps": 3, "schedule": "linear"}, {"steps": 3, "schedule": "linear", "name": "z"}],
            "train.stages: z begins where the stage before it ended, at a learning rate of 0; give it an lr",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(train, stages, told):
    with pytest.raises(ConfigProblems) as raised:
        recipe(*(StageConfig(**{"name": "s", **stage}) for stage in stages), **train)
    assert told in str(raised.value), str(raised.value)


def test_a_warm_up_as_long_as_its_curve_is_told():
    stages = StageConfig(name="a", steps=5), StageConfig(name="b", steps=4, schedule="linear", lr=1e-3, warmup_steps=4)
    told = recipe(*stages, optim=OptimConfig(lr=1e-3, warmup_steps=2)).cut_short()
    assert len(told) == 1 and told[0].startswith("stage b: the warm-up of the learning rate is all of it")
    assert not recipe(StageConfig(name="rise", steps=5, schedule="linear", lr=0, final_lr=1e-3)).cut_short()


def test_rates_rise_and_fall_without_a_gap():
    """No step of a long run has a rate that its neighbours have not nearly."""
    found = recipe(
        StageConfig(name="a", steps=1000, schedule="linear", lr=0, final_lr=1e-3),
        StageConfig(name="b", steps=5000, schedule="cosine", final_lr=1e-4),
        StageConfig(name="c", steps=3000, global_batch=32),
        StageConfig(name="d", steps=900, schedule="linear", lr=5e-4, warmup_steps=100),
    )
    rates = [found.learning_rate(step) for step in range(1, found.stages[-1].last + 1)]
    assert max(abs(after - before) for before, after in pairwise(rates)) < 5e-6
