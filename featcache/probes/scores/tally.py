"""What the metrics need to know of probes' logits, gathered chunk by chunk; and the metrics.

Every metric but average precision is a function of sums over images, so that its values in many
bootstrap resamples come from one product of matrices. Probabilities are those that a probe was
trained to give: the softmax for ce, the sigmoid for every other loss.
"""

import torch
from torch.nn import functional as F

from featcache.probes.losses import IGNORED
from featcache.probes.scores.average_precision import average_precision

BINS = 15
PIECE_ROWS = 16384


class Tally:
    """The logits of P probes on N images: `add` them in the order of the images, then ask for `scores`.

    labels: of all images, int8 [N, C] or int64 [N], on the device of the logits. classes: C. losses: of
    each probe, the type. `class_mean`: the metric that is no function of sums over images, but a mean over classes.
    """

    def __init__(self, labels, classes, losses):
        self.labels, self.classes = labels, classes
        self.softmax = [loss == "ce" for loss in losses]
        self.finite = torch.ones(len(self.softmax), dtype=torch.bool, device=labels.device)
        self._rows = 0

    @torch.no_grad()
    def add(self, logits):
        """Take the logits float32 [P, n, C] of the next n images."""
        end = self._rows + logits.shape[1]
        self.finite &= torch.isfinite(logits).flatten(1).all(1)
        # Numbers that sort and sum; what comes of them is left out in the end.
        self._keep(logits.nan_to_num() if not self.finite.all() else logits, slice(self._rows, end))
        self._rows = end

    @torch.no_grad()
    def scores(self, weights=None, only=None):
        """Return {metric: float64 [P, 1 + R]} on the CPU: of the images as they are, then of R resamples.

        weights: uint8 [N, R] as bootstrap.resamples gives them; [P, 1] without. only: the one metric that is
        asked for, so that others need not be computed. A probe with a logit that is not finite scores NaN.
        """
        if weights is not None:
            weights = weights.to(self.labels.device)
        table = {}
        if only != self.class_mean:
            table |= self._of_sums(weights)
        if only in (None, self.class_mean):
            table[self.class_mean] = self._class_mean(weights)
        broken = ~self.finite.cpu().unsqueeze(1)
        return {metric: values.cpu().masked_fill(broken, torch.nan) for metric, values in table.items()}

    def _of_sums(self, weights):
        sums = [0] * len(self.softmax)
        for rows in self._pieces():
            piece = _with_ones(weights, rows, self.labels).double()
            # Probe by probe, so that none depends on its neighbours by a rounding.
            for p in range(len(sums)):
                sums[p] += self._statistics(p, rows) @ piece
        found = [self._metrics(total) for total in sums]
        return {metric: torch.stack([each[metric] for each in found]) for metric in found[0]}

    def _pieces(self):
        return [slice(start, start + PIECE_ROWS) for start in range(0, len(self.labels), PIECE_ROWS)]

    def calibration(self):
        """Return float64 [P, BINS, 3]: pairs in each bin of the confidence, sums of their confidences and outcomes."""
        result = torch.zeros(len(self.softmax), BINS, 3, dtype=torch.float64, device=self.labels.device)
        for p in self.finite.nonzero()[:, 0].tolist():
            for rows in self._pieces():
                confidence, outcome, counted = self._pairs(p, rows)
                table = torch.stack([torch.ones_like(confidence), confidence, outcome], dim=2) * counted.unsqueeze(2)
                result[p].index_add_(0, _bins(confidence).flatten(), table.flatten(0, 1))
        return result.cpu()


def _with_ones(weights, rows, labels):
    """Rows of weights [n, R] behind a column of ones: each image once."""
    ones = torch.ones(len(labels[rows]), 1, dtype=torch.uint8, device=labels.device)
    return ones if weights is None else torch.cat([ones, weights[rows]], dim=1)


def _bins(confidence):
    """The bin of a confidence p in [0, 1]: b from 0 where b / BINS < p <= (b + 1) / BINS."""
    return confidence.mul(BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)


def _gaps(confidence, outcome, counted):
    """Sum, for each image and bin, confidence minus outcome over its pairs [n, K] that count: [BINS, n]."""
    gaps = torch.zeros(len(confidence), BINS, dtype=torch.float64, device=confidence.device)
    return gaps.scatter_add_(1, _bins(confidence), (confidence - outcome) * counted).t()


class SingleLabelTally(Tally):
    """Of one class an image. It keeps the rank of that class, the loss and the top confidence: 24 bytes an image."""

    class_mean = "balanced_accuracy"

    def _keep(self, logits, rows):
        if not self._rows:
            shape, device = (len(logits), len(self.labels)), logits.device
            self._rank = torch.empty(shape, dtype=torch.int64, device=device)
            self._loss = torch.empty(shape, dtype=torch.float64, device=device)
            self._confidence = torch.empty(shape, dtype=torch.float64, device=device)
        labels = self.labels[rows].unsqueeze(1)  # [n, 1]
        # Of equal logits the first ranks first, as argmax has it: a constant gets no credit.
        earlier = torch.arange(self.classes, device=logits.device) < labels
        for p, values in enumerate(logits):
            true = values.gather(1, labels)
            self._rank[p, rows] = ((values > true) | ((values == true) & earlier)).sum(1)
            values, true = values.double(), true.double().squeeze(1)
            if self.softmax[p]:
                norm = values.logsumexp(1)
                self._loss[p, rows] = norm - true
                self._confidence[p, rows] = (values.amax(1) - norm).exp()
            else:
                self._loss[p, rows] = F.softplus(values, threshold=40).mean(1) - true / self.classes
                self._confidence[p, rows] = values.amax(1).sigmoid()

    def _pairs(self, p, rows):
        hits = (self._rank[p, rows] == 0).double().unsqueeze(1)
        return self._confidence[p, rows].unsqueeze(1), hits, torch.ones_like(hits)

    def _statistics(self, p, rows):
        """[4 + BINS, n]: hit, hit among five, loss, 1; gaps."""
        rank, loss = self._rank[p, rows], self._loss[p, rows]
        sums = torch.stack([(rank < 1).double(), (rank < 5).double(), loss, torch.ones_like(loss)])
        return torch.cat([sums, _gaps(*self._pairs(p, rows))])

    def _metrics(self, sums):
        top1, top5, loss, images = sums[:4]
        return {
            "top1": top1 / images,
            "top5": top5 / images,
            "nll": loss / images,
            "ece": sums[4:].abs().sum(0) / images,
        }

    def _class_mean(self, weights):
        """The mean of the recalls of the classes that a resample holds."""
        hits, there = [0] * len(self.softmax), 0
        for rows in self._pieces():
            labels, piece = self.labels[rows], _with_ones(weights, rows, self.labels).float()
            order = labels.argsort()
            starts = torch.searchsorted(labels[order], torch.arange(self.classes, device=labels.device))
            there += F.embedding_bag(order, piece, starts, mode="sum")  # [C, R]
            for p, rank in enumerate(self._rank[:, rows]):
                hit = (rank[order] == 0).float()
                hits[p] += F.embedding_bag(order, piece, starts, mode="sum", per_sample_weights=hit)
        return torch.stack([(h.double() / there).nanmean(0) for h in hits])


class MultiLabelTally(Tally):
    """Of any number of classes an image; -1 is an unknown label, left out of every sum. It keeps all logits."""

    class_mean = "map"

    def _keep(self, logits, rows):
        if not self._rows:
            self._logits = logits.new_empty(len(logits), len(self.labels), self.classes)
        self._logits[:, rows] = logits

    def _pairs(self, p, rows):
        """Probability, target and whether it counts of every (image, class), each float64 [n, C].

        The softmax says how the classes present share one image: its target is 1 over their number, and
        images without a class do not count.
        """
        labels, logits = self.labels[rows], self._logits[p, rows].double()
        known, present = (labels >= 0).double(), (labels == 1).double()
        if not self.softmax[p]:
            return logits.sigmoid(), present, known
        count = present.sum(1, keepdim=True)
        probability = logits.masked_fill(labels < 0, IGNORED).softmax(1)
        return probability, present / count.clamp(min=1), known * (count > 0)

    def _statistics(self, p, rows):
        """[3 C + 3 + BINS, n]: found, predicted, actual of every class; loss, what divides it, pairs; gaps."""
        probability, target, counted = self._pairs(p, rows)
        labels, logits = self.labels[rows], self._logits[p, rows].double()
        actual = (labels == 1).double()
        predicted = ((probability >= 0.5) & (labels >= 0)).double()
        pairs = counted.sum(1)
        if self.softmax[p]:
            logs = logits.masked_fill(labels < 0, IGNORED).log_softmax(1)
            loss, divisor = -(target * logs).sum(1), (pairs > 0).double()
        else:
            loss, divisor = ((F.softplus(logits, threshold=40) - target * logits) * counted).sum(1), pairs
        sums = torch.stack([loss, divisor, pairs], dim=1)
        columns = torch.cat([predicted * actual, predicted, actual, sums], dim=1)
        return torch.cat([columns.t(), _gaps(probability, target, counted)])

    def _metrics(self, sums):
        found, predicted, actual = sums[: 3 * self.classes].unflatten(0, (3, self.classes))  # [C, R]
        loss, divisor, pairs = sums[3 * self.classes : 3 * self.classes + 3]
        result = {}
        for average, (hits, said, true) in {
            "macro": (found, predicted, actual),
            "micro": (found.sum(0, keepdim=True), predicted.sum(0, keepdim=True), actual.sum(0, keepdim=True)),
        }.items():
            # Of whole numbers, so that the clamp only turns 0 / 0 into 0.
            result[f"precision_{average}"] = (hits / said.clamp(min=1)).mean(0)
            result[f"recall_{average}"] = (hits / true.clamp(min=1)).mean(0)
            result[f"f1_{average}"] = (2 * hits / (said + true).clamp(min=1)).mean(0)
        return result | {"nll": loss / divisor, "ece": sums[3 * self.classes + 3 :].abs().sum(0) / pairs}

    def average_precisions(self, weights=None):
        """Average precision of every class, float64 [P, C, 1 + R]; NaN where there is no positive image."""
        weights = None if weights is None else weights.to(self.labels.device).float()
        classes = []
        for c, labels in enumerate(self.labels.t()):
            known = (labels >= 0).nonzero()[:, 0]
            part = None if weights is None else weights[known]
            classes.append(average_precision(self._logits[:, known, c], labels[known] == 1, part))
        return torch.stack(classes, dim=1)

    def _class_mean(self, weights):
        """The mean over the classes that have a positive image."""
        return self.average_precisions(weights).nanmean(1)


TALLIES = {"multi-label": MultiLabelTally, "single-label": SingleLabelTally}
