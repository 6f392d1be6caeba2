"""`raymuon plan`: plans for a person to read."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.planning.matrices import orthogonalization
from jobs.planning.plan import Machines, Plan, Terms, gigabytes, plan_run
from jobs.tell import tell
from optim.plan import PlanFigures
from orchestrator.config import RunConfig
from workers.calibrate import Calibration
from workers.errors import ConfigError


def show(config: RunConfig, counts: list[int], machines: Machines, terms: Terms, as_json: bool) -> None:
    """Print the plan for each number of GPUs; without a device, that of the matrices alone.

    Args:
        config: of the run.
        counts: of GPUs.
        machines: alike but for that.
        terms: what is known besides.
        as_json: as JSON on the last line of stdout.

    Raises:
        ConfigError: the last of them does not fit.
    """
    console = Console(highlight=False)
    if not machines.known:
        of_matrices = [orthogonalization(config, count) for count in counts]
        if as_json:
            tell([one.as_dict() for one in of_matrices])
        else:
            console.print(_matrices(of_matrices))
            console.print("With --gpu-type NAME or --calibration FILE: memory, time, traffic and money.")
        return
    plans = [plan_run(config, replace(machines, gpus=count), terms) for count in counts]
    if as_json:
        tell([one.as_dict() for one in plans] if len(plans) > 1 else plans[0].as_dict())
    else:
        for table in tables(plans):
            console.print(table)
    for one in plans:
        one.require_fit()


def read_calibration(path: Path) -> Calibration:
    """Read what the doctor has measured.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Calibration.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path}: cannot be read ({error}); raymuon doctor writes it") from error


def tables(plans: list[Plan]) -> list[Table]:
    """Return tables with a column for each plan."""
    heads = [f"{one.machines.gpus:,} x {one.device.device}" for one in plans]

    def table(title: str, rows: dict[str, list[str]]) -> Table:
        made = Table(title, *heads)
        for name, cells in rows.items():
            if any(cells):
                made.add_row(name, *cells)
        return made

    names = dict.fromkeys(part for one in plans for part in one.memory.parts())
    memory = {name: [_bytes(one.memory.parts().get(name, 0)) for one in plans] for name in names}
    memory["peak, in the phase"] = [f"{gigabytes(one.memory.peak)}, {one.memory.worst_phase}" for one in plans]
    memory["device"] = [gigabytes(one.device.memory_bytes) + ("" if one.fits else ": DOES NOT FIT") for one in plans]
    memory["a node's keeper, host memory"] = [gigabytes(one.memory.keeper_bytes_per_node) for one in plans]

    collectives = dict.fromkeys(name for one in plans for name in one.sent)
    traffic = {name: [_bytes(one.sent.get(name, 0)) for one in plans] for name in collectives}
    traffic["boundary"] = [_bytes(one.boundary_bytes) for one in plans]
    traffic["snapshot, each node to its buddy"] = [gigabytes(one.snapshot_bytes) for one in plans]

    parts = ("forward", "backward", "reduction", "optimizer", "gather", "boundary", "snapshot", "validation")
    time = {name: [_seconds(getattr(one.time, name)) for one in plans] for name in parts}
    time["step"] = [_seconds(one.time.total) for one in plans]
    time["Newton-Schulz, of it"] = [f"{one.time.newton_schulz_share:.1%}" for one in plans]
    time["tokens per second"] = [f"{one.tokens_per_second:,.0f}" for one in plans]
    time["model FLOPs utilization"] = [f"{one.mfu:.1%}" for one in plans]

    run = {
        "tokens": [f"{one.tokens:,}" for one in plans],
        "days": [f"{one.days:,.3g}" for one in plans],
        "GPU-hours": [f"{one.gpu_hours:,.3g}" for one in plans],
        "money": ["" if one.money is None else f"{one.money:,.2f}" for one in plans],
        "goodput expected": [f"{one.goodput.share:.2%}" if one.goodput else "" for one in plans],
        "best, with snapshots and checkpoints every": [
            f"{one.goodput.best_share:.2%}, {one.goodput.best_snapshot_every:,} and "
            f"{one.goodput.best_checkpoint_every:,} steps"
            if one.goodput
            else ""
            for one in plans
        ],
    }
    found = [
        table("memory of a rank, at its peak", memory),
        table("bytes that a rank sends in a step", traffic),
        table("seconds of a step", time),
        table("the run", run),
    ]
    matrices = [one.matrices for one in plans if one.matrices]
    return [*found, _matrices(matrices)] if matrices else found


def _matrices(plans: list[PlanFigures]) -> Table:
    table = Table(
        *("GPUs", "matrices", "straddlers", "MB each way", "of the all-gather"),
        *("TFLOP in all", "worst rank's", "over the mean"),
    )
    for one in plans:
        table.add_row(
            f"{one.gpus:,}",
            f"{one.matrices:,}",
            f"{one.straddlers:,}",
            f"{one.bytes_each_way / 1e6:,.1f}",
            f"{one.worst_share_of_all_gather:.3%}",
            f"{one.operations / 1e12:,.3f}",
            f"{one.worst_operations / 1e12:,.3f}",
            f"{one.imbalance:.2f}",
        )
    return table


def _bytes(nbytes: float) -> str:
    return gigabytes(nbytes) if nbytes >= 1e5 else f"{nbytes:,.0f} B" if nbytes else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g}"
