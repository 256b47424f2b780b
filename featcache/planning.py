"""`featcache plan`: what an extraction, or a sweep, would take, without writing anything."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featcache.arguments import CHECKPOINT, CHECKPOINTS, FLAG, NAME, PATH, Expected, takes, whole
from featcache.errors import BadInput
from featcache.extraction.extract import EXPECTED
from featcache.extraction.plan import ExtractionPlan, PlannedStore, plan_extraction
from featcache.feature import parse_beside
from featcache.probes.forwards import Forwards, count_forwards
from featcache.probes.grids.grid import Grid, load_grid
from featcache.ranks import join_ranks

BACKBONES = Expected(
    "the path of a checkpoint, or a list of paths",
    lambda value: CHECKPOINT.fits(value) or CHECKPOINTS.fits(value),
    CHECKPOINT.remedy,
)


@dataclass(frozen=True, repr=False)
class Plan(ExtractionPlan):
    """What an extraction takes. devices: how many were asked about. forwards: of a grid, None without one.

    Bytes are those of the files of features before compression; markers and labels are a few bytes a row more.
    """

    devices: int
    forwards: Forwards | None

    def __repr__(self) -> str:
        return f"Plan({len(self.stores)} stores, {self.bytes_to_write} bytes to write)"

    @property
    def seconds_on_devices(self) -> float | None:
        """An estimate for so many devices: each has a process with as many cores as this machine gives to one."""
        return None if self.seconds is None else self.seconds / self.devices


@takes(backbone=BACKBONES, grid=PATH, parity=NAME, devices=whole(1), measure=FLAG, **EXPECTED)
def plan(
    backbone: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dataset: str,
    grid: str | os.PathLike[str] | None = None,
    parity: str | None = None,
    devices: int = 1,
    measure: bool = True,
    **more: Any,
) -> Plan:
    """Return the Plan of what extract, extract_many or sweep would do with the same arguments. Nothing is written.

    backbone: as for extract; a list of them as for extract_many. grid, parity: as for sweep, to count how often training
    on images would run the backbone. devices: how many processes to estimate the time for, each with a device and cores
    like those of this one. measure: whether to measure, for a few seconds, how fast images are decoded and run. more:
    arguments of extract. Raises BadInput.

        plan = featcache.plan("ckpt.pth", "imagenet", root="/data", features="pooled", devices=8)
        print(plan.bytes_to_write, plan.free, plan.seconds_on_devices, len(plan.missing()))
    """
    if join_ranks().size > 1:
        raise BadInput("plan: start it without torchrun; --devices N says about how long N processes take")
    if parity is not None and grid is None:
        raise BadInput("--parity is a profile of a grid: name the grid with --grid")
    if grid is not None and more.get("masks") is not None:
        raise BadInput("--grid and --masks: probes train on images as they are, not on masked ones")
    checked = None if grid is None else load_grid(grid, parity)
    extraction, data = plan_extraction(backbone, dataset, measure, **more)
    forwards = None
    if checked is not None:
        for store in extraction.stores:
            _check_features(checked, store)
        rows = sum(store.rows for store in extraction.stores)
        forwards = count_forwards(checked, data, rows, len(extraction.stores))
    return Plan(**vars(extraction), devices=devices, forwards=forwards)


def _check_features(grid: Grid, store: PlannedStore) -> None:
    """Raise BadInput if a grid reads a feature that a store will not hold."""
    held = {feature.name for feature in store.features}
    for names in dict.fromkeys(spec.features for spec in grid.specs):
        for feature in parse_beside(names, store.parts[0].aliases):
            if str(feature) not in held:
                raise BadInput(
                    f"{grid.title}: reads {feature}, and the store {store.path} will hold {', '.join(sorted(held))}: add it "
                    "to --features"
                )
