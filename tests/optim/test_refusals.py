"""What would be silently wrong training is refused, with the reason."""

import pytest

from optim.config import OptimConfig
from optim.zero1 import LayoutError, Zero1Optimizer
from tests.optim.test_zero1_oracle import Toy, engine_of
from tests.ranks import run_ranks

SHAPES = {"a": (6, 4), "b": (5, 7), "c": (8, 8), "norm": (3,)}


def bound(rank: int, world_size: int, zero: dict) -> str:
    """Initialize DeepSpeed with these settings and return why the optimizer refuses to be bound."""
    try:
        engine_of(Toy(SHAPES), OptimConfig(), zero=zero)
    except LayoutError as error:
        return str(error)
    return ""


def test_round_robin_gradients_are_refused():
    for told in run_ranks(2, bound, {"round_robin_gradients": True, "stage": 2}):
        assert "zero_optimization.round_robin_gradients=true" in told


def bound_without_one(rank: int, world_size: int) -> str:
    toy = Toy(SHAPES)
    engine, _ = engine_of(toy, OptimConfig())
    rest = [(name, parameter) for name, parameter in toy.named_parameters() if name != "b"]
    with pytest.raises(LayoutError) as error:
        Zero1Optimizer(rest, OptimConfig(), ()).bind(engine.optimizer)
    return str(error.value)


def test_a_parameter_in_no_group_is_refused():
    assert run_ranks(1, bound_without_one) == ["b: in no group, so never trained; give the optimizer all parameters"]


def test_the_settings_that_we_make_are_not_refused():
    assert run_ranks(2, bound, {}) == ["", ""]


def test_a_class_that_deepspeed_would_take_for_its_own_is_refused():
    class MyMuon(Zero1Optimizer):
        pass

    with pytest.raises(LayoutError, match="MyMuon: DeepSpeed takes"):
        MyMuon(Toy(SHAPES).named_parameters(), OptimConfig(), ())


def test_a_parameter_that_is_given_twice_is_refused():
    toy = Toy(SHAPES)
    with pytest.raises(ValueError, match="again is the same parameter as a; give each once"):
        Zero1Optimizer([*toy.named_parameters(), ("again", toy.a)], OptimConfig(), ())
