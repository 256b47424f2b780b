"""A loss as convex problems over the logits of all images: values, slopes and curvatures, for full-batch training.

Q problems of R columns each are solved side by side. Logits are [Q, R, N]. A loss that couples its classes is one
problem of R = C columns, and a loss that does not is C problems of one column.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

# From logits [N, Q, C] and labels to the mean loss [Q] and its gradient [N, Q, C].
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Curvature:
    """Any loss, as one problem over all classes. Its curvature is taken class by class, and negative values count as 0.

    With negative curvature, conjugate gradients would follow a direction in which the model of the objective falls
    for ever.

    problems: how many problems the loss has. columns: of each.
    """

    # Whether the loss is known to be convex, so that weight decay bounds how far the optimum is.
    convex = False
    # Step of the differences of gradients that give the curvature, in logits.
    WIDTH = 1e-4

    def __init__(self, function: Function, labels: Tensor, classes: int):
        self.function, self.labels = function, labels
        self.problems, self.columns = 1, classes

    def _look(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.function(logits.permute(2, 0, 1), self.labels)
        return value, gradient.permute(1, 2, 0)

    def take(self, numbers: Tensor) -> "Curvature":
        """Return the problems of these numbers, int64 [Q], which may repeat."""
        return self

    def value(self, logits: Tensor) -> Tensor:
        """Return the losses of the problems at logits [Q, R, N]: [Q]."""
        return self._look(logits)[0]

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient by the logits, [Q, R, N], and the curvature in the form that `bend` and `diagonal` take."""
        above, below = (self._look(logits + by)[1] for by in (self.WIDTH, -self.WIDTH))
        return self._look(logits)[1], ((above - below) / (2 * self.WIDTH)).clamp_(min=0)

    def bend(self, curvature: Tensor, move: Tensor) -> Tensor:
        """Return the curvature times a move of the logits, both [Q, R, N]; the move may be overwritten."""
        return move.mul_(curvature)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Return the curvature of each column at each image, [Q, R, N]."""
        return curvature

    def free(self, step: Tensor) -> Tensor:
        """Return the part of a step, [Q, R, K], that changes the loss."""
        return step

    def among(self, rows: Tensor, count: int) -> Self:
        """Return the same problems over `count` images, in which its own are at `rows`, int64 [N]; others have no loss.

        Only convex losses can do this.
        """
        raise NotImplementedError

    @classmethod
    def joined(cls, curvatures: Sequence[Self]) -> Self:
        """Return the problems of several, one after another. All are over the same number of images."""
        raise NotImplementedError


class SeparateCurvature(Curvature):
    """Base of losses that are one problem for each column. parts: what the loss knows of each image, [Q, N] each."""

    convex, columns = True, 1

    def __init__(self, *parts: Tensor):
        self.parts = parts
        self.problems = len(parts[0])

    def take(self, numbers: Tensor) -> Self:
        """See Curvature.take."""
        return type(self)(*(part[numbers] for part in self.parts))

    def among(self, rows: Tensor, count: int) -> Self:
        """See Curvature.among."""
        return type(self)(*(part.new_zeros(len(part), count).index_copy_(1, rows, part) for part in self.parts))

    @classmethod
    def joined(cls, curvatures: Sequence[Self]) -> Self:
        """See Curvature.joined."""
        return cls(*(torch.cat(parts) for parts in zip(*(one.parts for one in curvatures), strict=True)))


class LogisticCurvature(SeparateCurvature):
    """The sum over images of a log(1 + exp(-z)) + b log(1 + exp(z)). parts: a and b, at least 0."""

    def value(self, logits: Tensor) -> Tensor:
        """See Curvature.value. No term is negative, so that nothing cancels where all logits are large."""
        z = logits[:, 0]
        present, absent = self.parts
        straight = torch.where(z < 0, present, absent).mul_(z.abs())
        return straight.addcmul_(present + absent, F.softplus(-z.abs())).sum(1)

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See Curvature.slope."""
        z = logits[:, 0]
        present, absent = self.parts
        p, rest = z.sigmoid(), torch.sigmoid(-z)
        return (absent * p - present * rest).unsqueeze(1), (present + absent).mul_(p).mul_(rest).unsqueeze(1)


class SquaredHingeCurvature(SeparateCurvature):
    """The sum over images of a max(0, 1 - y z)^2. parts: the weights a, and the signs y."""

    def _short(self, logits: Tensor) -> Tensor:
        """Return by how much margins fall short of 1, times the sign: y max(0, 1 - y z), [Q, N]."""
        signs = self.parts[1]
        return (signs - logits[:, 0]).mul_(signs).clamp_(min=0).mul_(signs)

    def value(self, logits: Tensor) -> Tensor:
        """See Curvature.value."""
        return self._short(logits).square_().mul_(self.parts[0]).sum(1)

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See Curvature.slope. The curvature is that of the images whose margin is short of 1."""
        twice, short = 2 * self.parts[0], self._short(logits)
        curvature = (short != 0).to(twice).mul_(twice)
        return short.mul_(twice).neg_().unsqueeze(1), curvature.unsqueeze(1)
