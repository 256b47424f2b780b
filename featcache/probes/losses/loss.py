"""What every loss computes, for many probes at once and in closed form: its mean over a mini-batch, and the gradient.

Logits are [B, P, C], and all P probes share the labels: int8 [B, C] of multi-label data (1, 0, and -1 where a class is
difficult), or int64 [B] of single-label data, which all losses but ce read as one-hot.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from featcache.probes.losses.curvature import Curvature
from featcache.probes.part import Part


class Loss(Part):
    """Base of all losses."""

    difficult: Literal["ignored", "negative"] = Field(
        "ignored", description="what a label of -1 is: ignored (no gradient) or negative"
    )

    # How logits become the probabilities that the loss compares with labels: each by a sigmoid, or all by a softmax.
    link: ClassVar[Literal["sigmoid", "softmax"]] = "sigmoid"
    # Whether it is convex in the logits, and its curvature can be of several sets of images at once.
    convex: ClassVar[bool] = False

    def weigh_classes(self, labels: Tensor, classes: int) -> Tensor | None:
        """Return weights of the classes, float64 [C], by how rare they are among labels, or None for equal weights."""
        return None

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return what compute() needs of the labels, in the dtype of the logits. weights: from weigh_classes()."""
        return present(labels, logits), shares(labels, logits)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss of every probe, [P], and the gradient of the sum of those losses, [B, P, C].

        targets: the result of targets(): by default which classes are present, and the share of each label in the
        mean, both [B, 1, C].
        """
        raise NotImplementedError

    def count(self, labels: Tensor, classes: int, weights: Tensor | None) -> float:
        """Return what the mean over these labels divides by, so that means over parts can be combined."""
        return int((labels >= 0).sum()) if labels.ndim == 2 else len(labels) * classes

    def curvature(self, function: "LossFunction", labels: Tensor) -> Curvature:
        """Return the loss as a function of the logits of all images, for full-batch training."""
        return Curvature(function, labels, function.classes)

    def read(self, labels: Tensor) -> Tensor:
        """Return the labels with difficult ones as this loss reads them."""
        return labels.clamp(min=0) if self.difficult == "negative" and labels.ndim == 2 else labels


class LossFunction:
    """A loss on one training set, whose labels decide the weights of the classes."""

    def __init__(self, loss: Loss, labels: Tensor, classes: int):
        self.loss, self.classes = loss, classes
        self._cached: tuple[Any, Any, tuple[Any, ...]] = None, None, ()
        self.weights = loss.weigh_classes(labels, classes)

    def __call__(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of every probe, [P], and its gradient, [B, P, C]."""
        # The slices of a stack come one after another with the same labels.
        if self._cached[0] is not labels or self._cached[1] != logits.dtype:
            self._cached = labels, logits.dtype, self.loss.targets(self.loss.read(labels), logits, self.weights)
        return self.loss.compute(logits, *self._cached[2])

    def targets(self, labels: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return the Loss.targets of labels, in a dtype."""
        like = torch.zeros(len(labels), 1, self.classes, dtype=dtype, device=labels.device)
        return self.loss.targets(self.loss.read(labels), like, self.weights)

    def count(self, labels: Tensor) -> float:
        """Return what the mean over these labels divides by."""
        return self.loss.count(self.loss.read(labels), self.classes, self.weights)


def occurrences(labels: Tensor, classes: int) -> Tensor:
    """Return how many images have each class, float64 [C]."""
    return (one_hot(labels, classes) > 0).sum(0).double()


def absences(labels: Tensor, classes: int) -> Tensor:
    """Return how many images lack each class, not counting difficult ones, float64 [C]."""
    return (one_hot(labels, classes) == 0).sum(0).double()


def usable(weights: Tensor) -> Tensor:
    """Return class weights with 1 where a class without examples made them 0 or infinite."""
    return torch.where(torch.isfinite(weights) & (weights > 0), weights, 1.0)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return labels as [N, C], those of single-label data int64 [N] as 1 and 0."""
    return F.one_hot(labels, classes) if labels.ndim == 1 else labels


def present(labels: Tensor, logits: Tensor) -> Tensor:
    """Return which classes each image has, as 1 or 0 in the dtype of the logits, [B, 1, C]."""
    if labels.ndim == 2:
        return (classes_first(labels) > 0).to(logits.dtype)
    # Classes before images in memory, as logits lie.
    one_hot = logits.new_zeros(logits.shape[2], len(labels))
    return one_hot.scatter_(0, labels.unsqueeze(0), 1).t().unsqueeze(1)


def classes_first(values: Tensor) -> Tensor:
    """View [B, C] as [B, 1, C], with classes before images in memory, as logits lie."""
    return values.t().contiguous().t().unsqueeze(1)


def shares(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the share of each label in a mean over all that are not ignored: 0, or one over their number.

    [B, 1, C], or [1, 1, 1] for single-label data.
    """
    if labels.ndim == 1:
        return logits.new_full((1, 1, 1), 1 / (len(labels) * logits.shape[2]))
    known = (classes_first(labels) >= 0).to(logits.dtype)
    return known.div_(known.sum().clamp(min=1))
