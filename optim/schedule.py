"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (1 is the first) in a run of `steps`.

    Linear warm-up to the peak; then a cosine to `final_lr_fraction` (Moonlight, table 1), or warm-up-stable-decay: the
    peak until the last `decay_fraction` of the steps, then a straight line to the same final rate.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    floor = config.final_lr_fraction
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = config.decay_fraction * steps
        share = min(1.0, max(0, steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * (floor + (1 - floor) * share)


def cut_short(config: OptimConfig, steps: int) -> str:
    """Return what a run of `steps` leaves out of its schedule; empty where it comes about whole."""
    warmup = config.warmup_steps
    share = learning_rate(config, min(warmup + 1, steps), steps) / config.lr
    if warmup >= steps:
        return (
            f"optim.warmup_steps={warmup} are all of train.steps={steps}: the learning rate ends at {share:.2f} of "
            "optim.lr"
        )
    if config.schedule == "wsd" and warmup > (1 - config.decay_fraction) * steps:
        return (
            f"optim.warmup_steps={warmup} end within the decay, optim.decay_fraction={config.decay_fraction} of "
            f"train.steps={steps}: the learning rate falls from optim.lr to {share:.2f} of it at once"
        )
    return ""
