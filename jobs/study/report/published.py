"""Figures that others have published, shown beside ours and never as ours."""

from jobs.study.fits.power_law import PowerLaw
from jobs.study.fits.ratio import ratio_of
from jobs.study.question import Curve

MOONLIGHT = {"muon": PowerLaw(2.506, 0.052), "adamw": PowerLaw(2.608, 0.054)}
"""Moonlight (arXiv 2502.16982), table 3: nats per token over the compute in PFLOP/s-days."""
MOONLIGHT_LOSSES = (2.23, 3.0)
"""The range of its figure 3."""


def moonlight_ratio(points: int = 20) -> Curve:
    """Return AdamW's compute over Muon's by Moonlight's fits, over their losses, which are of another text."""
    low, high = MOONLIGHT_LOSSES
    losses = [low + (high - low) * i / (points - 1) for i in range(points)]
    return Curve(
        label="Moonlight's fits (0.4 to 1.5 B; their text)",
        x=losses,
        y=[ratio_of(MOONLIGHT["adamw"], MOONLIGHT["muon"], loss) for loss in losses],
        kind="line",
        context=True,
    )
