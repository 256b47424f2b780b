"""Evidence: the numbers about images that metrics read, computed once for all metrics that share them.

Each class holds the numbers of p probes on all N images. A metric names the class that it reads.
"""

from dataclasses import dataclass

from torch import Tensor

# Number of bins of the confidence, of equal width, in which calibration is measured.
BINS = 15


@dataclass(frozen=True, eq=False)
class Evidence:
    """Base of all kinds of evidence."""


@dataclass(frozen=True, eq=False)
class Ranks(Evidence):
    """The rank of each image's true class, from 0: int64 [p, N]. labels: int64 [N]. classes: the number C."""

    ranks: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True, eq=False)
class Logits(Evidence):
    """All logits, class by class: float32 [p, C, N]. labels: int8 [C, N], -1 where the label is unknown."""

    logits: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Sums(Evidence):
    """Numbers whose sums over images give the mean loss and the calibration error, float64.

    losses, divisors: [p, N]; the mean loss is the ratio of their sums. gaps: confidence minus outcome in each bin,
    [p, BINS, N]. pairs: number of confidences that each image adds, [p, N].
    """

    losses: Tensor
    divisors: Tensor
    gaps: Tensor
    pairs: Tensor


@dataclass(frozen=True, eq=False)
class Decisions(Sums):
    """Sums, and the classes that are predicted (with a probability of 0.5 or more). float64 except codes.

    hits, predicted, actual: numbers of classes that are rightly predicted, predicted, and present in each image, [p, N].
    class_hits, class_predicted, class_actual: the same numbers for each class over the images, [p, C].
    codes: uint8 [p, C, N], 1 where a class is predicted, plus 2 where it is present.
    pieces: slices of the images that are processed at a time.
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
    """The values that a PlainMetric gathered, [p, N, ...]. labels: of all images, int8 [N, C] or int64 [N]."""

    values: Tensor
    labels: Tensor
