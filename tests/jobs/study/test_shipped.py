"""The studies that are shipped: each can be run as it is."""

import pytest

from jobs.study.file import load_study, shipped
from jobs.study.question import points

OURS = ["ablation", "muon-adamw", "weight-decay", "wire"]


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_study_is_sound_and_so_are_its_first_trials(name):
    found = load_study(name)
    found.study.question.check(found.study)
    trials = found.study.question.trials(found.study, {})
    assert found.study.name == name and len({trial.name for trial in trials}) == len(trials) > 0
    for trial in trials:
        config = found.config(trial, {})
        assert config.data.source.startswith("python-stdlib"), "text that every machine has"
        assert not config.train.sample_prompt and config.train.seq_len == 256


@pytest.mark.parametrize("name", OURS)
def test_every_point_differs_from_the_base_in_its_trials_config(name):
    """A point that sets what the base has already would be compared with itself."""
    found = load_study(name)
    trials = [trial for trial in found.study.question.trials(found.study, {}) if trial.seed == 0]
    configs = [found.config(trial, {"run.name": "same"}) for trial in trials]
    assert len({repr(config) for config in configs}) == len(configs)


def test_a_comparison_has_seeds_for_an_interval():
    for name in OURS:
        study = load_study(name).study
        seen = 1 if study.question.name == "search" else 0  # Its first seed chooses.
        assert len(study.seeds) - seen >= 3 and all(len(points(axis, key)) > 1 for key, axis in study.axes.items())
