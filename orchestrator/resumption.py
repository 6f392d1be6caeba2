"""What it means to go on with a run up to a number of steps: decided before Ray starts.

A run is never trained backwards, and one that is finished is not finished once more: both would look like success.
"""

from workers.common.errors import ConfigError


def check_steps(run_id: str, reached: int, steps: int, finished: bool) -> str:
    """Return what a person should know of going on with a run; empty where there is nothing to tell.

    Args:
        run_id: of the run.
        reached: the step of its newest checkpoint; 0 without one.
        steps: to train it to.
        finished: it is on record as finished.

    Raises:
        ConfigError: nothing is left to train.
    """
    way_on = f"to train it further give it more steps: train.steps=N with N > {reached}, or a further stage; "
    way_on += "or begin a new run"
    if reached > steps:
        raise ConfigError(f"run {run_id} has come to step {reached}, and train.steps={steps} is before that; {way_on}")
    if reached == steps and finished:
        raise ConfigError(f"run {run_id} is finished, at step {reached}; {way_on}")
    if reached == steps:
        return f"run {run_id} has come to train.steps={steps}: no step is left, only its end is made good; {way_on}"
    return ""


def new_beside(finished_id: str, name: str) -> str:
    """Return that a new run begins although there is a finished one of that name."""
    return (
        f"no run named {name} is unfinished, so a new one begins; train the finished one further with: "
        f"--resume {finished_id} train.steps=N, or a further stage"
    )
