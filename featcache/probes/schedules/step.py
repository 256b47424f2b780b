"""The step schedule."""

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from featcache.probes.part import CountOr0, Positive, Whole
from featcache.probes.schedules.schedule import WarmedUp


def _rising(points: tuple[float, ...]) -> tuple[float, ...]:
    if list(points) != sorted(set(points)) or any(p >= 1 and p != int(p) for p in points):
        raise ValueError("is not a rising list of epochs, or of fractions below 1")
    return points


class Step(WarmedUp):
    """The rate is multiplied by gamma at every milestone, or after every so many epochs.

    A milestone below 1 is that fraction of the run, rounded to an epoch unless `per` is step.
    """

    type: Literal["step"] = "step"
    milestones: Annotated[tuple[Positive, ...], AfterValidator(_rising)] = Field(
        (), description="epochs, or fractions of the run, at which the rate changes"
    )
    every: CountOr0 = Field(0, description="epochs between changes, in place of milestones")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="what the rate is multiplied by")
    per: Literal["step", "epoch"] = Field(
        "epoch", description="whether the factor changes at any step or between epochs"
    )

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if bool(self.milestones) == bool(self.every):
            return "schedule: a step needs either milestones or every"
        return None

    @property
    def per_epoch(self) -> bool:
        """See WarmedUp.per_epoch."""
        return self.per == "epoch"

    def factor(self, now: Tensor, epochs: int, steps: int) -> Tensor:
        """See WarmedUp.factor: gamma to the power of how many changes have passed."""
        if self.every:
            return self.gamma ** (now / self.every).floor()
        points = [m * epochs if m < 1 else m for m in self.milestones]
        # Times are quotients and fractions of the run are products, so both may be off by a rounding.
        times = [round(point) if self.per_epoch else point - 1e-9 for point in points]
        return self.gamma ** torch.stack([(now >= time).double() for time in times]).sum(0)
