"""A loss as a convex function of the logits of all images: values, slopes and curvatures, for full-batch training."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from featcache.probes.losses.loss import LossFunction


class Curvature:
    """Any loss, as one problem of all classes. Only what bends up of its curvature is used, class by class.

    What bends down would make the objective fall without end in the eyes of conjugate gradients.
    """

    # For differences of gradients, in logits.
    WIDTH = 1e-4

    def __init__(self, function: "LossFunction", labels: Tensor):
        self.function, self.labels = function, labels

    def _look(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        value, push = self.function(logits.unsqueeze(1), self.labels)
        return value, push[:, 0]

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Return products of [K, C], one for each problem: [1]."""
        return (left * right).sum().expand(1)

    def value(self, logits: Tensor) -> Tensor:
        """Return the losses of the problems at logits [N, C]."""
        return self._look(logits)[0]

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient by the logits, [N, C], and the curvature, which `bend` and `flat` understand."""
        above, below = (self._look(logits + by)[1] for by in (self.WIDTH, -self.WIDTH))
        return self._look(logits)[1], ((above - below) / (2 * self.WIDTH)).clamp_(min=0)

    def bend(self, curvature: Tensor, move: Tensor) -> Tensor:
        """Return the curvature times a move of the logits, both [N, C]."""
        return curvature * move

    def flat(self, curvature: Tensor) -> Tensor:
        """Return the curvature of each class, summed over images, [C]."""
        return curvature.sum(0)

    def free(self, step: Tensor) -> Tensor:
        """Return the part of a step, [K, C], that changes the loss."""
        return step
