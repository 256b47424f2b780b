"""The logits of trained probes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featcache.device import multiplying
from featcache.probes.engine.blocks import padded, rows_at_once
from featcache.probes.heads.head import Stack
from featcache.probes.spec import ProbeSpec
from featcache.probes.weights import side_by_side


def predict(stack: Stack, batch_size: int | None, features: Tensor) -> Tensor:
    """Return the logits [P, n, C] of a stack on float32 features [n, D] or [n, D, S], always in float32."""
    rows = rows_at_once(batch_size, features[0, 0].numel())
    with multiplying("float32"):
        # [P, C, n] as in a single part, so that the memory order of a probe's logits does not depend on its neighbours.
        parts = [stack.forward(part).permute(1, 2, 0) for part in features.split(rows)]
    return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).transpose(1, 2)


class Predictor:
    """Trained probes of one block, as a function from features to logits. weights: one {name: tensor} for each spec."""

    def __init__(
        self, specs: Sequence[ProbeSpec], weights: Sequence[dict[str, Tensor]], classes: int, device: torch.device
    ):
        padding = len(padded(specs, classes)) - len(specs)
        first, self._probes, self._batch_size = specs[0], len(specs), specs[0].batch_size
        stacked = side_by_side([*weights, *[weights[-1]] * padding], device)
        self._stack = first.head.stack(stacked, first.precision)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Map features [n, D] or [n, D, S], any float dtype, to logits float32 [P, n, C] where the features are."""
        return predict(self._stack, self._batch_size, features.float())[: self._probes]
