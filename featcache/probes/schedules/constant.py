"""The constant schedule."""

from typing import Literal

import torch
from torch import Tensor

from featcache.probes.schedules.schedule import WarmedUp


class Constant(WarmedUp):
    """The rate stays what it is."""

    type: Literal["constant"] = "constant"

    def factor(self, now: Tensor, epochs: int, steps: int) -> Tensor:
        """See WarmedUp.factor."""
        return torch.ones_like(now)
