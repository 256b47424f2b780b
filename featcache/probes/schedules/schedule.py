"""What every schedule does: it gives the factor of a probe's learning rate at every step."""

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.part import AtLeast0, Part, Share


class Schedule(Part):
    """Base of all schedules."""

    def factors(self, epochs: int, steps: int, epoch: int) -> Tensor:
        """Return the factors of one epoch's steps, float64 [steps].

        epochs: of the whole run, warm-up included. steps: of an epoch. epoch: from 0.
        """
        raise NotImplementedError


class WarmedUp(Schedule):
    """A schedule with a linear warm-up.

    In a warm-up of W steps, step i < W has start + (1 - start) i / (W - 1) times its rate without warm-up (mmengine's
    LinearLR; torch's with total_iters W - 1). start is warmup_start, or 1 / W.
    """

    warmup_epochs: AtLeast0 = Field(0.0, description="epochs of linear warm-up, fractions allowed")
    warmup_start: Share = Field(0.0, description="factor of the first step; 0 is one over the number of warm-up steps")

    @property
    def per_epoch(self) -> bool:
        """Whether the factor changes between epochs only, not from step to step."""
        return True

    def factors(self, epochs: int, steps: int, epoch: int) -> Tensor:
        """See Schedule.factors."""
        step = epoch * steps + torch.arange(steps, dtype=torch.float64)
        now = torch.full_like(step, epoch) if self.per_epoch else step / steps
        factor = self.factor(now, epochs, steps)
        return factor * self._warmup(step, steps) if self.warmup_epochs else factor

    def factor(self, now: Tensor, epochs: int, steps: int) -> Tensor:
        """Return the factors without warm-up. now: the time of each step, in epochs, float64 [steps]."""
        raise NotImplementedError

    def _warmup(self, step: Tensor, steps: int) -> Tensor:
        length = self.warmup_epochs * steps
        start = self.warmup_start or 1 / length
        factor = (start + (1 - start) * step / max(length - 1, 1e-9)).clamp(max=1)
        return factor if length > 1 else torch.ones_like(step)
