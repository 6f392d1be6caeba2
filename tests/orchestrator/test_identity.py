"""What makes a run another run: it is refused by name, and what lies ahead may change."""

import pytest

from optim.config import OptimConfig
from orchestrator.identity import refuse_other
from workers.common.errors import ConfigError


def mixture(*stages: list[int]) -> dict:
    return {"data": {"a": "1" * 64, "b": "2" * 64}, "data.mixture": [[1, 1, 1], *stages]}


@pytest.mark.parametrize(
    ("saved", "wanted", "reached"),
    [
        (mixture(), mixture([50, 1, 3]), 49),
        (mixture([50, 1, 3]), mixture([50, 2, 3]), 49),
        (mixture([50, 1, 3]), mixture(), 49),
        (mixture([20, 1, 3], [50, 1, 3]), mixture([20, 1, 3], [60, 1, 3]), 49),
        (mixture([20, 1, 3]), mixture([30, 1, 3]), 0),
    ],
)
def test_weights_of_steps_that_are_to_come_may_change(saved, wanted, reached):
    refuse_other("runs/x", saved, wanted, reached)


@pytest.mark.parametrize(
    ("wanted", "reached"),
    [
        (mixture([50, 2, 3]), 50),
        (mixture([49, 1, 3]), 50),
        (mixture(), 50),
        (mixture([20, 1, 1], [50, 1, 3]), 50),
        ({**mixture([50, 1, 3]), "data.mixture": [[1, 2, 1], [50, 1, 3]]}, 0),
    ],
)
def test_weights_that_held_already_may_not(wanted, reached):
    with pytest.raises(ConfigError, match=r"data\.mixture: the checkpoint has"):
        refuse_other("runs/x", mixture([50, 1, 3]), wanted, reached)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.growth", [[20, 16]]),
        ("data.window", 64),
        ("data.document_mask", True),
        ("data.chat_template", "3" * 64),
        ("data.tokenizer", "4" * 64),
        ("optim.width_rule", "spectral"),
    ],
)
def test_what_a_run_had_and_a_config_leaves_out_is_told_as_the_other_way_round(key, value):
    """A batch that has grown would shrink silently, and the samples between be read twice."""
    for saved, wanted in ((mixture(), {**mixture(), key: value}), ({**mixture(), key: value}, mixture())):
        with pytest.raises(ConfigError, match=rf"{key}: the checkpoint has .*None") as error:
            refuse_other("runs/x", saved, wanted, 20)
        assert len(str(error.value).splitlines()) == 3


def test_a_rule_of_widths_makes_another_run_and_none_makes_the_run_that_there_was():
    plain, ruled = OptimConfig(base_width=64), OptimConfig(width_rule="rms", base_width=64)
    assert plain.identity == {"optim.name": "muon"}
    assert ruled.identity == {"optim.name": "muon", "optim.width_rule": "rms", "optim.base_width": 64}
    with pytest.raises(ConfigError, match="base_width: the checkpoint has 64, the config 32"):
        refuse_other("runs/x", ruled.identity, OptimConfig(width_rule="rms", base_width=32).identity, 0)


def test_a_changed_source_is_told_by_its_name():
    wanted = {**mixture(), "data": {"a": "1" * 64, "b": "3" * 64}}
    with pytest.raises(ConfigError, match=r"data\.b: the checkpoint has") as error:
        refuse_other("runs/x", mixture(), wanted, 10)
    assert "data.a" not in str(error.value)
