"""How the optimizer shares its matrices out over the ranks."""

from jobs.planning.state import layout_of
from optim.assignment import PlanFigures
from optim.exchange import dtype_on
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError


def orthogonalization(config: RunConfig, gpus: int) -> PlanFigures:
    """Plan the matrices of the config's model over so many GPUs.

    Raises:
        ConfigError: there is nothing to plan.
    """
    kind = "cuda"
    itemsize, wire = (dtype_on(kind, of).itemsize for of in (config.train.precision, config.optim.wire_dtype))
    figures = layout_of(config.model, config.optim, gpus).plan_figures(config.optim, itemsize, wire)
    if figures is None:
        raise ConfigError(f"optim.name={config.optim.name}: no matrix is orthogonalized")
    return figures
