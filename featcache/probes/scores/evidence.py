"""What metrics read: numbers about the images that several metrics share, computed once for all of them.

Each holds the numbers of p probes on all N images. A metric names the kind that it reads.
"""

from dataclasses import dataclass

from torch import Tensor

# Bins of the confidence, of equal width, in which calibration is measured.
BINS = 15


@dataclass(frozen=True, eq=False)
class Evidence:
    """Base of all kinds of evidence."""


@dataclass(frozen=True, eq=False)
class Ranks(Evidence):
    """The rank of each image's class, from 0: int64 [p, N]. labels: int64 [N]. classes: their number C."""

    ranks: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True, eq=False)
class Logits(Evidence):
    """All logits, class by class: float32 [p, C, N]. labels: int8 [C, N], -1 where a label is not known."""

    logits: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Sums(Evidence):
    """What adds up over images to a loss and a calibration error, float64.

    losses, divisors: of each image, [p, N]; the mean loss is the ratio of their sums. gaps: confidence minus outcome
    in each bin, [p, BINS, N]. pairs: how many confidences each image adds, [p, N].
    """

    losses: Tensor
    divisors: Tensor
    gaps: Tensor
    pairs: Tensor


@dataclass(frozen=True, eq=False)
class Decisions(Sums):
    """And which classes are predicted, at a probability of 0.5 or more. float64 but for codes.

    hits, predicted, actual: how many classes each image has that are rightly predicted, predicted and present, [p, N].
    class_hits, class_predicted, class_actual: the same of each class over the images, [p, C].
    codes: uint8 [p, C, N], 1 where a class is predicted, plus 2 where it is present.
    pieces: slices of the images that are passed over at a time.
    """

    hits: Tensor
    predicted: Tensor
    actual: Tensor
    class_hits: Tensor
    class_predicted: Tensor
    class_actual: Tensor
    codes: Tensor
    pieces: list[slice]


@dataclass(frozen=True, eq=False)
class Gathered(Evidence):
    """What a PlainMetric gathered: [p, N, ...]. labels: of all images, int8 [N, C] or int64 [N]."""

    values: Tensor
    labels: Tensor
