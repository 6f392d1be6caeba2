"""`raymuon plan`: plans for a person to read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from jobs.planning.choice import deepest
from jobs.planning.estimate import Machines, gigabytes
from jobs.planning.plan import Plan, Terms, plan_run, with_types
from jobs.planning.state import num_blocks
from jobs.planning.widths import scaled
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from optim.assignment import PlanFigures
from orchestrator.config import RunConfig
from workers.calibrate import Calibration
from workers.common.errors import ConfigError


def show(
    config: RunConfig,
    counts: list[int],
    machines: Machines,
    terms: Terms,
    as_json: bool,
    largest: bool = False,
    settings: Mapping[str, str] = {},
) -> None:
    """Print the plan for each number of GPUs, a column for each; without a device, for types that would do.

    Args:
        config: of the run.
        counts: of GPUs.
        machines: alike but for that.
        terms: what is known besides.
        as_json: as JSON on the last line of stdout.
        largest: with as many layers as fit.
        settings: values that a settings file has set, by key, each with where it comes from.

    Raises:
        ConfigError: one of them does not fit, or `largest` without a device.
    """
    if largest and not machines.known:
        raise ConfigError("--largest needs --gpu-type NAME or --calibration FILE: it asks what fits into a device")
    cases = [replace(machines, gpus=count) for count in counts]
    if not machines.known:
        cases = [case for one in cases for case in with_types(config, one)]
    plans = []
    with Screen(stderr=True).status("planning") as status:
        for case in cases:
            status.update(f"planning {case.gpus} x {case.device().device}")
            model = deepest(config, case) if largest else config
            plans.append(plan_run(model, case, terms))
    if as_json:
        own = {"settings": dict(settings)} if settings else {}
        told = [one.as_dict() | own for one in plans]
        tell(told if len(told) > 1 else told[0])
    else:
        console = Screen()
        if not machines.known:
            text = "No --gpu-type and no --calibration: these are the smallest and the fastest GPUs that hold the run."
            console.print(text)
        heads = [f"{one.machines.gpus:,} x {one.device.device}" for one in plans]
        for title, rows in tables(plans).items():
            print_table(console, ("", *heads), [(name, *cells) for name, cells in rows.items()], title)
        if settings:
            print_table(console, ("", "value"), list(settings.items()), "settings that a study has found")
        console.print(accuracy(plans[0].device))
    for one in plans:
        one.require_fit()


def accuracy(device: Calibration) -> str:
    """Return how far such plans have been from what was measured (docs/commands/plan.md)."""
    if device.kind == "cuda":
        return "Not measured on GPUs yet: sizes of state and weights are exact, the rest is an estimate."
    return "Measured on CPUs: memory within 10 % of the plan, seconds of a step within 25 %."


def read_calibration(path: Path) -> Calibration:
    """Read what the doctor has measured.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Calibration.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path}: cannot be read ({error}); raymuon doctor writes it") from error


def tables(plans: list[Plan]) -> dict[str, dict[str, list[str]]]:
    """Return by title and name of a row what stands in it for each plan, with its unit."""
    names = dict.fromkeys(part for one in plans for part in one.memory.parts())
    memory = {name: [_bytes(one.memory.parts().get(name, 0)) for one in plans] for name in names}
    memory["peak"] = [gigabytes(one.memory.peak) for one in plans]
    memory["in the phase"] = [one.memory.worst_phase for one in plans]
    memory["device"] = [gigabytes(one.device.memory_bytes) + ("" if one.fits else ": DOES NOT FIT") for one in plans]
    memory["to spare"] = [gigabytes(max(0, one.device.memory_bytes - one.needed)) for one in plans]
    host = {
        "keeper": [gigabytes(one.memory.keeper_bytes_per_node) for one in plans],
        "models while a new run is built": [_bytes(one.host_build_bytes) for one in plans],
    }

    collectives = dict.fromkeys(name for one in plans for name in one.sent)
    traffic = {name: [_bytes(one.sent.get(name, 0)) for one in plans] for name in collectives}
    traffic["boundary"] = [_bytes(one.boundary_bytes) for one in plans]
    traffic["snapshot, each node to its buddy"] = [gigabytes(one.snapshot_bytes) for one in plans]

    parts = ("forward", "backward", "reduction", "optimizer", "gather", "boundary", "snapshot", "validation")
    time = {name: [_seconds(getattr(one.time, name)) for one in plans] for name in parts}
    time["hidden under the passes"] = [_seconds(one.time.hidden) if one.time.hidden else "" for one in plans]
    time["step"] = [_seconds(one.time.total) for one in plans]
    time["Newton-Schulz, of it"] = [f"{one.time.newton_schulz_share:.1%}" for one in plans]
    time["speed"] = [f"{one.tokens_per_second:,.0f} tokens/s" for one in plans]
    time["model FLOPs utilization"] = [f"{one.mfu:.1%}" for one in plans]

    best = [one.goodput for one in plans]
    run = {
        "parameters": [f"{one.parameters:,}" for one in plans],
        "layers": [str(num_blocks(one.config.model)) for one in plans],
        "tokens": [f"{one.tokens:,}" for one in plans],
        "time": [f"{one.days:,.3g} days" for one in plans],
        "GPU time": [f"{one.gpu_hours:,.3g} hours" for one in plans],
        "money": ["" if one.money is None else f"{one.money:,.2f}" for one in plans],
        "goodput expected": [f"{one.share:.2%}" if one else "" for one in best],
        "best goodput": [f"{one.best_share:.2%}" if one else "" for one in best],
        "with snapshots every": [f"{one.best_snapshot_every:,} steps" if one else "" for one in best],
        "and checkpoints every": [f"{one.best_checkpoint_every:,} steps" if one else "" for one in best],
    }
    blocks = [num_blocks(one.config.model) for one in plans]
    trains = [one.config.train for one in plans]
    chosen = {
        "sequences at once": [str(one.micro_batch) for one in trains],
        "layers computed again": [
            f"{one.recomputed(all_)} of {all_}" for one, all_ in zip(trains, blocks, strict=True)
        ],
        "logits": [one.logits for one in trains],
        "gradients": [one.gradients for one in trains],
        "added up in": [_sums(one) for one in plans],
    }
    found = {
        "how it is trained": chosen,
        "memory of a rank, at its peak": memory,
        "host memory of a node": host,
        "sent by a rank in a step": traffic,
        "a step": time,
        "the run": run,
        "stages": _stages(plans),
        "matrices": _matrices([one.matrices for one in plans]),
        _rule(plans[0]): _scaled(plans),
    }
    said = {title: {name: cells for name, cells in rows.items() if any(cells)} for title, rows in found.items()}
    return {title: rows for title, rows in said.items() if rows}


def _sums(plan: Plan) -> str:
    train = plan.config.train
    in_fp32 = train.gradients == "partitioned" or train.accumulate == "fp32" or plan.device.precision == "fp32"
    return "fp32" if in_fp32 else "bf16"


def _rule(plan: Plan) -> str:
    optim = plan.config.optim
    return f"width rule {optim.width_rule}, from base width {optim.base_width}"


def _scaled(plans: list[Plan]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for kind in scaled(plans[0].config.model, plans[0].config.optim):
        label = kind.label if kind.label not in rows else f"{kind.label}, other parts"
        rows[label] = [str(kind)] * len(plans)
    return rows


def _stages(plans: list[Plan]) -> dict[str, list[str]]:
    rows = {}
    for number, stage in enumerate(plans[0].stages):
        name = f"{stage.name}: {stage.steps:,} steps of {stage.global_batch:,}, {stage.tokens / 1e9:,.4g} G tokens"
        rows[name] = [_share(one, number) for one in plans]
    return rows


def _share(plan: Plan, number: int) -> str:
    days, money = plan.of_stage(plan.stages[number])
    return f"{days:,.3g} days" + ("" if money is None else f", {money:,.2f}")


def _matrices(plans: list[PlanFigures | None]) -> dict[str, list[str]]:
    def row(cell: Callable[[PlanFigures], str]) -> list[str]:
        return [cell(one) if one else "" for one in plans]

    return {
        "orthogonalized": row(lambda one: f"{one.matrices:,}"),
        "straddlers": row(lambda one: f"{one.straddlers:,}"),
        "sent each way": row(lambda one: f"{one.bytes_each_way / 1e6:,.1f} MB"),
        "at worst, of a rank's all-gather": row(lambda one: f"{one.worst_share_of_all_gather:.3%}"),
        "work in all": row(lambda one: f"{one.operations / 1e12:,.3f} TFLOP"),
        "work of the worst rank": row(lambda one: f"{one.worst_operations / 1e12:,.3f} TFLOP"),
        "over the mean": row(lambda one: f"{one.imbalance:.2f} times"),
    }


def _bytes(nbytes: float) -> str:
    return gigabytes(nbytes) if nbytes >= 1e5 else f"{nbytes:,.0f} B" if nbytes else ""


def _seconds(seconds: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{scale * seconds:,.3g} {unit}"
