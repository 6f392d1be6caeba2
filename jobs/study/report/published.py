"""Figures that others have published, shown beside ours and never as ours.

They are of other models, texts, sizes and rules of tuning. `read` says whether we have them from the source itself, or
from others who quote it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jobs.study.fits.power_law import PowerLaw
from jobs.study.fits.ratio import ratio_of
from jobs.study.question import Curve, Settings, Table

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


@dataclass(frozen=True)
class Published:
    """What a source says of Muon against AdamW."""

    source: str
    setting: str
    figure: str
    read: Literal["source", "quoted"] = "source"


SPEEDUPS = (
    Published(
        "Moonlight, arXiv 2502.16982",
        "0.4 to 1.5 B dense, AdamW tuned, Muon with AdamW's rate, decay and batch",
        "0.519 of AdamW's FLOPs at the end of the fitted range; no intervals",
    ),
    Published(
        "Essential AI, arXiv 2505.02222",
        "0.1 to 4 B, batches to 16 M tokens",
        "10 to 15 % fewer tokens; more at large batches",
    ),
    Published(
        "Wen et al., arXiv 2509.02046",
        "11 optimizers, each tuned; 0.1 to 1.2 B, 1 to 8 times Chinchilla's tokens",
        "1.3 to 1.4 times at 130 M, 1.1 times at 1.2 B; fits project none at 7 B",
        "quoted",
    ),
    Published(
        "Qiu et al., arXiv 2512.05620",
        "190 M to 1.4 B",
        "about 1.4 times throughout with muP and decay over the width; less than 1.1 at 1.4 B without",
    ),
    Published(
        "modded-nanogpt, track 3",
        "124 M, fixed text and batch, to a validation loss of 3.28",
        "3,250 steps; Adam 5,625 (under-tuned, its authors say), a better Adam 4,875",
    ),
    Published(
        "marin, issues 5596 and 5597",
        "mixtures of experts, both on a hypersphere and tuned; 2.2e17 to 2.8e19 FLOPs",
        "1.33, 1.26, 1.22, 1.19 times in wall time; fits project a tie at 1e21",
    ),
)
"""Both ways: whether the advantage lasts with size is open."""


def speedups() -> Table:
    """Return what others have published of Muon against AdamW."""
    rows = [[one.source, one.setting, one.figure, one.read] for one in SPEEDUPS]
    return Table(
        title="Published by others, not measured here: Muon against AdamW",
        columns=["source", "setting", "Muon", "read in"],
        rows=rows,
        note="Other models, texts, sizes and rules of tuning: context, not a comparison with the figures above.",
    )


def both_optimizers(settings: Iterable[Settings]) -> bool:
    """Tell whether settings compare Muon with AdamW, so that what others have found of that belongs beside it."""
    return {"muon", "adamw"} <= {one.get("optim.name") for one in settings}
