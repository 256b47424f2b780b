"""A loss as a convex function of the logits of all images: values, slopes and curvatures, for full-batch training."""

from collections.abc import Callable

from torch import Tensor

# From logits [N, 1, C] and labels to the mean loss [1] and its gradient [N, 1, C].
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Curvature:
    """Any loss, as one problem over all classes. Its curvature is taken class by class, and negative values count as 0.

    With negative curvature, conjugate gradients would follow a direction in which the model of the objective falls
    for ever.
    """

    # Step of the differences of gradients that give the curvature, in logits.
    WIDTH = 1e-4

    def __init__(self, function: Function, labels: Tensor):
        self.function, self.labels = function, labels

    def _look(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.function(logits.unsqueeze(1), self.labels)
        return value, gradient[:, 0]

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner product of two [K, C] for each problem: [1]."""
        return (left * right).sum().expand(1)

    def value(self, logits: Tensor) -> Tensor:
        """Return the losses of the problems at logits [N, C]."""
        return self._look(logits)[0]

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient by the logits, [N, C], and the curvature in the form that `bend` and `flat` take."""
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
