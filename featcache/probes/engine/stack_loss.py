"""The losses of a stack, whose probes may minimise different ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featcache.probes.engine.memory import MemoryBudget
from featcache.probes.losses.loss import LossFunction
from featcache.probes.spec import ProbeSpec


class StackLoss:
    """The losses of P probes on one training set, computed for slices of neighbours that share a loss.

    specs: sorted by loss. labels: of the training set. batch_size: images of a mini-batch. A slice is as long as the
    memory for losses allows.
    """

    def __init__(self, specs: Sequence[ProbeSpec], labels: Tensor, classes: int, batch_size: int):
        longest = max(MemoryBudget.of(labels.device).losses // (8 * batch_size * classes), 1)
        functions = {loss: LossFunction(loss, labels, classes) for loss in {spec.loss for spec in specs}}
        self._slices: list[tuple[LossFunction, int, int]] = []  # (loss, first probe, end)
        for number, spec in enumerate(specs):
            function = functions[spec.loss]
            if self._slices:
                last, start, _ = self._slices[-1]
                if last is function and number - start < longest:
                    self._slices[-1] = (function, start, number + 1)
                    continue
            self._slices.append((function, number, number + 1))

    def __call__(self, logits: Tensor, targets: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Return losses [P] and their gradient [B, P, C] for logits [B, P, C]. exact: compute in float64.

        No probe's numbers depend on another's logits.
        """
        loss = logits.new_empty(logits.shape[1])
        # On a CPU, exp and log round differently in a vector and in the few elements left over, and which elements
        # those are depends on the neighbours. In float64 that difference is gone after the cast back.
        dtype = torch.float64 if exact else logits.dtype
        # The strides are those of the logits whatever the mix of losses, so that sums over it run in the same order.
        gradient = torch.empty_like(logits)
        for function, start, end in self._slices:
            loss[start:end], gradient[:, start:end] = function(logits[:, start:end].to(dtype), targets)
        return loss, gradient
