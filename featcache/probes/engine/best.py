"""What validation scores decide: the weights that are kept, and whether training goes on."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def stalled(scores: Tensor, patience: int) -> Tensor:
    """Return which probes have gone `patience` epochs without a better score, bool [P].

    scores: float64 [epochs, P], higher is better; a NaN is lower than all.
    """
    if not patience or len(scores) <= patience:
        return torch.zeros(scores.shape[1], dtype=torch.bool)
    scores = scores.nan_to_num(nan=-torch.inf)
    return scores[-patience:].amax(0) <= scores[:-patience].amax(0)


@dataclass
class BestWeights:
    """The best validation score of P probes so far, and the weights that had it.

    scores: float64 [P] on the CPU, higher is better, -inf where there is none. epochs: int64 [P] on the CPU, the epochs
    done by then, 0 where there is none. weights: {name: [P, ...]} on the device of training.
    """

    scores: Tensor
    epochs: Tensor
    weights: dict[str, Tensor]

    @classmethod
    def before_validation(cls, weights: dict[str, Tensor]) -> Self:
        """Return the state before the first validation. weights: {name: [P, ...]}, whatever they are; copied."""
        count = len(next(iter(weights.values())))
        scores = torch.full((count,), -torch.inf, dtype=torch.float64)
        return cls(
            scores, torch.zeros(count, dtype=torch.int64), {name: w.detach().clone() for name, w in weights.items()}
        )

    def update(self, scores: Tensor, epoch: int, weights: dict[str, Tensor]) -> None:
        """Take the scores [P] and weights after an epoch where they are better; a NaN never is."""
        scores = scores.nan_to_num(nan=-torch.inf)
        better = scores > self.scores
        self.scores[better] = scores[better]
        self.epochs[better] = epoch
        for name, best in self.weights.items():
            at = better.to(best.device)
            best[at] = weights[name][at].detach()

    def keep(self, stay: Tensor) -> None:
        """Drop all probes but those with the numbers `stay`, int64 [P']."""
        self.scores, self.epochs = self.scores[stay], self.epochs[stay]
        self.weights = {name: w[stay.to(w.device)] for name, w in self.weights.items()}
