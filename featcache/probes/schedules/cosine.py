"""The cosine schedule."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.part import Share
from featcache.probes.schedules.schedule import WarmedUp


class Cosine(WarmedUp):
    """The rate falls along half a cosine (Loshchilov & Hutter, ICLR 2017, without restarts).

    final + (1 - final) (1 + cos(pi t)) / 2 with t the elapsed share of the epochs after the warm-up.
    """

    type: Literal["cosine"] = "cosine"
    final: Share = Field(0.0, description="factor at the end")
    per: Literal["step", "epoch"] = Field(
        "step", description="whether the factor changes at any step or between epochs"
    )

    @property
    def per_epoch(self) -> bool:
        """See WarmedUp.per_epoch."""
        return self.per == "epoch"

    def factor(self, now: Tensor, epochs: int, steps: int) -> Tensor:
        """See WarmedUp.factor."""
        last = max(epochs - self.warmup_epochs, 1 if self.per_epoch else 1 / steps)
        share = ((now - self.warmup_epochs) / last).clamp(0, 1)
        return self.final + (1 - self.final) * (1 + torch.cos(math.pi * share)) / 2
