"""Gatherers keep what metrics need from the logits of probes, chunk by chunk, and turn it into evidence.

Probabilities are those that a probe was trained to give: the softmax, or a sigmoid for each class.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from featcache.errors import BadInput
from featcache.probes.scores.evidence import BINS, Decisions, Evidence, Gathered, Logits, Ranks, Sums
from featcache.probes.scores.metric import Metric, PlainMetric

# Quantity of numbers that are processed at a time. On a CPU they should stay in the cache; on a GPU few, large steps
# are best.
AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 23}
# Stands for minus infinity where a label is unknown. It is finite so that 0 times it is 0.
IGNORED = -1e30


class Gatherer:
    """Base of all gatherers, for P probes on N images.

    labels: of all images, int8 [N, C] or int64 [N]. classes: C. softmax: for each probe, whether its probabilities are
    a softmax rather than sigmoids. offers: the kinds of evidence that it makes. bins: float64 [P, BINS, 3], see
    Tally.calibration.
    """

    offers: ClassVar[tuple[type[Evidence], ...]]

    def __init__(self, labels: Tensor, classes: int, softmax: list[bool]):
        self.labels, self.classes, self.softmax = labels, classes, softmax
        self.bins = torch.zeros(len(softmax), BINS, 3, dtype=torch.float64, device=labels.device)

    def offered(self, metric: Metric) -> type[Evidence]:
        """Return the kind of evidence on offer that a metric can read. Raises BadInput if there is none."""
        for kind in self.offers:
            if issubclass(kind, metric.reads):
                return kind
        task = "multi-label" if self.labels.ndim == 2 else "single-label"
        raise BadInput(f"metric {metric.type} reads {metric.reads.__name__}, which {task} data does not have")

    def bytes_per_image(self) -> int:
        """Return the bytes that are kept for each image and probe."""
        raise NotImplementedError

    def keep(self, logits: Tensor, rows: slice) -> None:
        """Take the logits float32 [P, n, C], all finite, of some images."""
        raise NotImplementedError

    def width(self, kind: type[Evidence]) -> int:
        """Return how many numbers evidence of a kind processes for each image and probe."""
        raise NotImplementedError

    def read(self, kind: type[Evidence], probes: slice) -> Evidence:
        """Return the evidence about a slice of the probes, which all give softmaxes or all give sigmoids."""
        raise NotImplementedError

    def pieces(self, images: int) -> list[slice]:
        """Return slices of the images small enough that all their classes can be processed at a time."""
        size = max(AT_ONCE[self.labels.device.type] // self.classes, 64)
        return [slice(start, min(start + size, images)) for start in range(0, images, size)]

    def _gaps(self, probes: slice, confidence: Tensor, outcome: Tensor, counted: Tensor) -> Tensor:
        """Return confidence minus outcome, summed over the pairs [p, K, n] that count, by bin and image: [p, BINS, n].

        The pairs are also added to `bins`.
        """
        # The bin of a confidence c in [0, 1] is the b from 0 with b / BINS < c <= (b + 1) / BINS.
        bins = confidence.mul(BINS).ceil_().long().sub_(1).clamp_(0, BINS - 1)
        gaps = confidence.new_zeros(len(bins), BINS, bins.shape[2])
        confidence, outcome = confidence * counted, outcome * counted
        gaps.scatter_add_(1, bins, confidence - outcome)
        # All probes share one row of bins, one after another.
        bins += BINS * torch.arange(len(bins), device=bins.device).view(-1, 1, 1)
        for column, numbers in enumerate((counted, confidence, outcome)):
            sums = gaps.new_zeros(len(bins) * BINS).index_add_(0, bins.flatten(), numbers.flatten())
            self.bins[probes, :, column] += sums.view(-1, BINS)
        return gaps


class SingleLabelGatherer(Gatherer):
    """For single-label data: keeps the rank of each image's class, the loss and the top confidence."""

    offers = (Ranks, Sums)

    def __init__(self, labels: Tensor, classes: int, softmax: list[bool]):
        super().__init__(labels, classes, softmax)
        shape = len(softmax), len(labels)
        self._ranks = torch.empty(shape, dtype=torch.int64, device=labels.device)
        self._losses = torch.empty(shape, dtype=torch.float64, device=labels.device)
        self._confidence = torch.empty(shape, dtype=torch.float64, device=labels.device)

    def bytes_per_image(self) -> int:
        """Return the bytes of a rank, a loss and a confidence."""
        return 3 * 8

    def keep(self, logits: Tensor, rows: slice) -> None:
        """Take the logits float32 [P, n, C], all finite, of some images."""
        classes, labels = torch.arange(self.classes, device=logits.device), self.labels[rows].unsqueeze(1)
        for piece in self.pieces(logits.shape[1]):
            images = slice(rows.start + piece.start, rows.start + piece.stop)
            self._keep_piece(logits[:, piece], labels[piece], (classes < labels[piece]).float(), images)

    def _keep_piece(self, logits: Tensor, labels: Tensor, earlier: Tensor, images: slice) -> None:
        """Take the logits [P, n, C] of a piece of the images.

        labels: [n, 1]. earlier: [n, C], 1 for classes that come before that of the image. images: the slice of all N.
        """
        for p, values in enumerate(logits):
            true, top = values.gather(1, labels), values.amax(1, keepdim=True).double()
            # Among equal logits the first class ranks first, as in argmax, so that constant logits get no credit.
            # Summing 0 and 1 as float32 is several times faster than summing booleans.
            flags = torch.eq(values, true, out=torch.empty_like(values)).mul_(earlier)
            ranks = flags.sum(1) + torch.gt(values, true, out=flags).sum(1)
            self._ranks[p, images] = ranks.long()
            true = true.squeeze(1).double()
            if self.softmax[p]:
                # log sum exp(z), less the largest logit.
                norm = values.double().sub_(top).exp_().sum(1).log_()
                self._losses[p, images] = norm + (top.squeeze(1) - true)
                self._confidence[p, images] = norm.neg_().exp_()
            else:
                self._losses[p, images] = F.softplus(values.double(), threshold=40).mean(1) - true / self.classes
                self._confidence[p, images] = top.squeeze(1).sigmoid()

    def width(self, kind: type[Evidence]) -> int:
        """Return 1 for ranks, else the number of bins."""
        return 1 if kind is Ranks else BINS

    def read(self, kind: type[Evidence], probes: slice) -> Evidence:
        """Return Ranks or Sums of a slice of the probes."""
        if kind is Ranks:
            return Ranks(self._ranks[probes], self.labels, self.classes)
        losses, hits = self._losses[probes], (self._ranks[probes] < 1).double()
        ones = torch.ones_like(losses)
        self.bins[probes] = 0
        gaps = self._gaps(probes, *(rows.unsqueeze(1) for rows in (self._confidence[probes], hits, ones)))
        return Sums(losses, ones, gaps, ones)


class MultiLabelGatherer(Gatherer):
    """For multi-label data: keeps all logits. Labels of -1 are left out of every sum."""

    offers = (Logits, Decisions)

    def __init__(self, labels: Tensor, classes: int, softmax: list[bool]):
        super().__init__(labels, classes, softmax)
        self._by_class = labels.t().contiguous()
        # Class by class, as predictions lie in memory.
        self._logits = torch.empty(len(softmax), classes, len(labels), device=labels.device)

    def bytes_per_image(self) -> int:
        """Return the bytes of the logits."""
        return 4 * self.classes

    def keep(self, logits: Tensor, rows: slice) -> None:
        """Take the logits float32 [P, n, C], all finite, of some images."""
        self._logits[:, :, rows] = logits.transpose(1, 2)

    def width(self, kind: type[Evidence]) -> int:
        """Return 1 for the logits, which are read class by class, else the number of classes."""
        return 1 if kind is Logits else self.classes

    def read(self, kind: type[Evidence], probes: slice) -> Evidence:
        """Return Logits or Decisions of a slice of the probes."""
        return Logits(self._logits[probes], self._by_class) if kind is Logits else self._decisions(probes)

    def _decisions(self, probes: slice) -> Decisions:
        """Return Decisions, with all sums from a single pass over the pairs of class and image."""
        shape, pieces = self._logits[probes].shape, self.pieces(len(self.labels))
        # The rows are: hits, predicted, actual, losses, divisors, pairs, and the gap in each bin.
        images = self._logits.new_empty(shape[0], 6 + BINS, shape[2], dtype=torch.float64)
        classes = self._logits.new_zeros(shape[0], 3, shape[1], dtype=torch.float64)
        codes = torch.empty(shape, dtype=torch.uint8, device=self._logits.device)
        self.bins[probes] = 0
        for rows in pieces:
            probability, target, counted = self._pairs(probes, rows)
            images[:, 3, rows], images[:, 4, rows] = self._losses(probes, rows, target, counted)
            images[:, 5, rows] = counted.sum(1)
            images[:, 6:, rows] = self._gaps(probes, probability, target, counted.expand_as(probability))
            labels = self._by_class[:, rows]
            predicted = (probability >= 0.5).logical_and_(labels >= 0).double()
            actual = (labels == 1).double().unsqueeze(0)
            codes[:, :, rows] = predicted + 2 * actual
            for row, flags in enumerate((predicted * actual, predicted, actual)):
                classes[:, row] += flags.sum(2)
                images[:, row, rows] = flags.sum(1)
        hits, predicted, actual, losses, divisors, pairs = images[:, :6].unbind(1)
        return Decisions(
            losses=losses, divisors=divisors, gaps=images[:, 6:], pairs=pairs,
            hits=hits, predicted=predicted, actual=actual,
            class_hits=classes[:, 0], class_predicted=classes[:, 1], class_actual=classes[:, 2],
            codes=codes, pieces=pieces,
        )  # fmt: skip

    def _pairs(self, probes: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return, as float64, the probability [p, C, n] of every (class, image), and its target and weight [1, C, n].

        The target is 0 or 1 for sigmoids. For the softmax, the classes present share the image equally: each has the
        target 1 over their number, and images without a class do not count.
        """
        labels, logits = self._by_class[:, rows], self._logits[probes, :, rows].double()
        known, present = (labels >= 0).double().unsqueeze(0), (labels == 1).double().unsqueeze(0)
        if not self.softmax[probes.start]:
            return logits.sigmoid_(), present, known
        count = present.sum(1, keepdim=True)
        probability = logits.masked_fill_(labels < 0, IGNORED).softmax(1)
        return probability, present / count.clamp(min=1), known * (count > 0)

    def _losses(self, probes: slice, rows: slice, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of every image [p, n], and its divisor [1, n]. target, counted: from _pairs."""
        logits = self._logits[probes, :, rows].double()
        if not self.softmax[probes.start]:
            losses = F.softplus(logits, threshold=40).sub_(logits.mul_(target)).mul_(counted)
            return losses.sum(1), counted.sum(1)
        logs = logits.masked_fill_(self._by_class[:, rows] < 0, IGNORED).log_softmax(1)
        return logs.mul_(target).sum(1).neg_(), (counted.sum(1) > 0).double()


class MetricGatherer(Gatherer):
    """For a PlainMetric: keeps what the metric gathers from the logits."""

    offers = (Gathered,)

    def __init__(self, metric: PlainMetric, labels: Tensor, classes: int, softmax: list[bool]):
        super().__init__(labels, classes, softmax)
        self._metric = metric
        self._softmax = torch.tensor(softmax, device=labels.device)
        # A single image shows the shape and type of what the metric gathers.
        sample = self._kept(torch.zeros(len(softmax), 1, classes, device=labels.device), slice(0, 1))
        self._values = sample.new_empty(len(softmax), len(labels), *sample.shape[2:])

    def _kept(self, logits: Tensor, rows: slice) -> Tensor:
        return self._metric.checked_gather(logits, self.labels[rows], self._softmax)

    def bytes_per_image(self) -> int:
        """Return the bytes of what the metric gathers."""
        return self._values[0, 0].nbytes

    def keep(self, logits: Tensor, rows: slice) -> None:
        """Take the logits float32 [P, n, C], all finite, of some images."""
        self._values[:, rows] = self._kept(logits, rows)

    def width(self, kind: type[Evidence]) -> int:
        """Return how many numbers are kept."""
        return max(self._values[0, 0].numel(), 1)

    def read(self, kind: type[Evidence], probes: slice) -> Evidence:
        """Return what was gathered from a slice of the probes."""
        return Gathered(self._values[probes], self.labels)
