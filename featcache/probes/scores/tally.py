"""What the metrics need to know of probes' logits, gathered chunk by chunk; and the metrics.

Every metric is known without any one image, too, from a pass over the images: average precision from one sort,
the others because they are functions of sums over images. Probabilities are those that a probe was
trained to give: the softmax for ce, the sigmoid for every other loss.
"""

import torch
from torch.nn import functional as F

from featcache.probes.losses import IGNORED
from featcache.probes.scores.average_precision import average_precision
from featcache.probes.scores.jackknife import deviations, influences

BINS = 15
# Numbers that are passed over at a time: on a CPU they stay in the cache, on a GPU a step costs its launches.
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


class Tally:
    """The logits of P probes on N images: `add` them in the order of the images, then ask for scores.

    labels: of all images, int8 [N, C] or int64 [N], on the device of the logits. classes: C. losses: of
    each probe, the type. `class_mean`: the metric that is a mean over classes of how their images rank, and which is
    asked for in training.
    """

    def __init__(self, labels, classes, losses):
        self.labels, self.classes = labels, classes
        self.softmax = [loss == "ce" for loss in losses]
        self.finite = torch.ones(len(self.softmax), dtype=torch.bool, device=labels.device)
        self._bins = None
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
    def scores(self, only=None):
        """Return {metric: float64 [P]} on the CPU. only: the one metric that is asked for, so that others need not be
        computed. A probe with a logit that is not finite scores NaN.
        """
        return {metric: scores for metric, (scores,) in self._table(lambda score, *_: (score,), False, only).items()}

    @torch.no_grad()
    def estimates(self):
        """Return {metric: (scores, standard deviations, counts)}, each float64 [P] on the CPU: see jackknife.py.

        counts: how many images or decisions make the score, at most the images that say something of it.
        """
        return self._table(lambda score, left_out, count: (score, deviations(influences(score, left_out)), count))

    @torch.no_grad()
    def influences(self):
        """Return {metric: (scores [P], influences [P, N])}, float64 on the CPU: see jackknife.py. For few probes."""
        return self._table(lambda score, left_out, _: (score, influences(score, left_out)))

    def _table(self, reduce, leave_out=True, only=None):
        """Return {metric: reduce(scores, left_out, counts)} of all probes.

        Of some at a time, so that the scores without each image [P, N] are not held. They are None without leave_out.
        """
        self._bins = torch.zeros(len(self.softmax), BINS, 3, dtype=torch.float64, device=self.labels.device)
        parts, judged = {}, self._judged()
        size = max(AT_ONCE[self.labels.device.type] // len(self.labels), 1)
        for start in range(0, len(self.softmax), size):
            probes = range(len(self.softmax))[start : start + size]
            found = {}
            if only in (None, self.class_mean):
                found[self.class_mean] = self._class_mean(slice(start, start + size), leave_out)
            if only != self.class_mean:
                # Probe by probe, so that none depends on its neighbours by a rounding.
                each = [self._of_sums(p, leave_out) for p in probes]
                found |= {m: tuple(map(_stacked, zip(*(one[m] for one in each), strict=True))) for m in each[0]}
            for metric, (scores, left_out, counts) in found.items():
                counts = scores.new_full(scores.shape, judged) if counts is None else counts.clamp(max=judged)
                parts.setdefault(metric, []).append(reduce(scores, left_out, counts))
        table = {m: [torch.cat(column).cpu() for column in zip(*rows, strict=True)] for m, rows in parts.items()}
        broken = ~self.finite.cpu()
        for columns in table.values():
            for column in columns:
                column[broken] = torch.nan
        return {metric: tuple(columns) for metric, columns in table.items()}

    def _pieces(self):
        """Slices of the images, as many of all their classes as are passed over at a time."""
        size = max(AT_ONCE[self.labels.device.type] // self.classes, 64)
        return [slice(start, start + size) for start in range(0, len(self.labels), size)]

    def calibration(self):
        """Return float64 [P, BINS, 3] on the CPU: pairs in each bin of the confidence, sums of their confidences and
        outcomes. To be asked for after scores or estimates of all metrics, which count them.
        """
        return self._bins.cpu().masked_fill(~self.finite.cpu().view(-1, 1, 1), 0)

    def _gaps(self, p, confidence, outcome, counted):
        """Sum, for each image and bin, confidence minus outcome over its pairs [K, n] that count: [BINS, n].

        Counts them for calibration(), too.
        """
        # The bin of a confidence c in [0, 1]: b from 0 where b / BINS < c <= (b + 1) / BINS.
        bins = confidence.mul(BINS).ceil_().long().sub_(1).clamp_(0, BINS - 1)
        confidence, outcome = confidence * counted, outcome * counted
        for column, numbers in enumerate((counted, confidence, outcome)):
            self._bins[p, :, column].index_add_(0, bins.flatten(), numbers.flatten())
        gaps = torch.zeros(BINS, bins.shape[1], dtype=torch.float64, device=bins.device)
        return gaps.scatter_add_(0, bins, confidence.sub_(outcome))


def _stacked(numbers):
    """Stack tensors, of which each may be None."""
    return None if numbers[0] is None else torch.stack(numbers)


def _ratio(upper, lower, leave_out, least=0):
    """The sum of upper [n] over that of lower [n], of all images and without each of them, and the latter sum.

    least: 1 where lower sums whole numbers, which turns 0 / 0 into 0.
    """
    above, below = upper.sum(), lower.sum()
    left_out = (above - upper) / (below - lower).clamp(min=least) if leave_out else None
    return above / below.clamp(min=least), left_out, below


def _calibration_error(gaps, pairs, leave_out):
    """The expected calibration error of gaps [BINS, n] in pairs [n], as _ratio."""
    total, count = gaps.sum(1), pairs.sum()
    left_out = (total.unsqueeze(1) - gaps).abs_().sum(0) / (count - pairs) if leave_out else None
    return total.abs().sum() / count, left_out, count


class SingleLabelTally(Tally):
    """Of one class an image. It keeps the rank of that class, the loss and the top confidence: 24 bytes an image."""

    class_mean = "balanced_accuracy"

    def _judged(self):
        """How many images say something of a score."""
        return len(self.labels)

    def _keep(self, logits, rows):
        if not self._rows:
            shape, device = (len(logits), len(self.labels)), logits.device
            self._rank = torch.empty(shape, dtype=torch.int64, device=device)
            self._loss = torch.empty(shape, dtype=torch.float64, device=device)
            self._confidence = torch.empty(shape, dtype=torch.float64, device=device)
        classes = torch.arange(self.classes, device=logits.device)
        for piece in self._pieces():
            part = logits[:, piece][:, : logits.shape[1]]
            if part.shape[1]:
                labels = self.labels[rows][piece].unsqueeze(1)
                at = slice(rows.start + piece.start, rows.start + piece.start + part.shape[1])
                self._keep_piece(part, labels, (classes < labels).float(), at)

    def _keep_piece(self, logits, labels, earlier, rows):
        """logits [P, n, C], labels [n, 1], earlier [n, C]: whether a class comes before that of the image."""
        for p, values in enumerate(logits):
            true, top = values.gather(1, labels), values.amax(1, keepdim=True).double()
            # Of equal logits the first ranks first, as argmax has it: a constant gets no credit. Sums of 0 and 1 in
            # float32, several times faster than of booleans.
            flags = torch.eq(values, true, out=torch.empty_like(values)).mul_(earlier)
            ranks = flags.sum(1) + torch.gt(values, true, out=flags).sum(1)
            self._rank[p, rows] = ranks.long()
            true = true.squeeze(1).double()
            if self.softmax[p]:
                # log of the sum of exp, less the largest logit.
                norm = values.double().sub_(top).exp_().sum(1).log_()
                self._loss[p, rows] = norm + (top.squeeze(1) - true)
                self._confidence[p, rows] = norm.neg_().exp_()
            else:
                self._loss[p, rows] = F.softplus(values.double(), threshold=40).mean(1) - true / self.classes
                self._confidence[p, rows] = top.squeeze(1).sigmoid()

    def _of_sums(self, p, leave_out):
        """{metric: (score, without each image [N] or None, what it is a share of or None)} of a probe."""
        rank, ones = self._rank[p], torch.ones_like(self._loss[p])
        hits = (rank < 1).double()
        gaps = self._gaps(p, *(row.unsqueeze(0) for row in (self._confidence[p], hits, ones)))
        return {
            "top1": _ratio(hits, ones, leave_out),
            "top5": _ratio((rank < 5).double(), ones, leave_out),
            "nll": _ratio(self._loss[p], ones, leave_out),
            "ece": _calibration_error(gaps, ones, leave_out),
        }

    def _class_mean(self, probes, leave_out):
        """The mean of the recalls of the classes that the images hold: of probes, and without each image."""
        hits = (self._rank[probes] == 0).double()  # [P, N]
        images = self.labels.bincount(minlength=self.classes)  # [C]
        found = hits.new_zeros(len(hits), self.classes).index_add_(1, self.labels, hits)
        recalls = found / images.clamp(min=1)
        total, count = recalls.sum(1), (images > 0).sum()
        if not leave_out:
            return total / count, None, None
        # Without its only image a class is not there.
        fewer = images[self.labels] - 1
        without = (found[:, self.labels] - hits) / fewer.clamp(min=1)
        left_out = total.unsqueeze(1) - recalls[:, self.labels] + without
        return total / count, left_out / (count - (fewer == 0).long()), None


class MultiLabelTally(Tally):
    """Of any number of classes an image; -1 is an unknown label, left out of every sum. It keeps all logits."""

    class_mean = "map"

    def __init__(self, labels, classes, losses):
        super().__init__(labels, classes, losses)
        self._by_class = labels.t().contiguous()
        self._precisions = None

    def _judged(self):
        """How many images say something of a score: those of a class."""
        return int((self.labels == 1).any(1).sum())

    def _keep(self, logits, rows):
        if not self._rows:
            # In memory as predictions are: class by class.
            self._logits = logits.new_empty(len(logits), self.classes, len(self.labels))
        self._logits[:, :, rows] = logits.transpose(1, 2)

    def _pairs(self, p, rows):
        """Probability, target and whether it counts of every (class, image), each float64 [C, n].

        The softmax says how the classes present share one image: its target is 1 over their number, and
        images without a class do not count.
        """
        labels, logits = self._by_class[:, rows], self._logits[p, :, rows].double()
        known, present = (labels >= 0).double(), (labels == 1).double()
        if not self.softmax[p]:
            return logits.sigmoid_(), present, known
        count = present.sum(0)
        probability = logits.masked_fill(labels < 0, IGNORED).softmax(0)
        return probability, present / count.clamp(min=1), known * (count > 0)

    def _losses(self, p, rows, target, counted):
        """The loss of every image, and what divides it, float64 [n]. target, counted: see _pairs."""
        logits = self._logits[p, :, rows].double()
        if not self.softmax[p]:
            losses = F.softplus(logits, threshold=40).sub_(logits.mul_(target)).mul_(counted)
            return losses.sum(0), counted.sum(0)
        logs = logits.masked_fill(self._by_class[:, rows] < 0, IGNORED).log_softmax(0)
        return -(target * logs).sum(0), (counted.sum(0) > 0).double()

    def _of_sums(self, p, leave_out):
        """{metric: (score, without each image [N] or None, what it is a share of or None)} of a probe."""
        images = self._logits.new_empty(6 + BINS, len(self.labels), dtype=torch.float64)
        classes = self._logits.new_zeros(3, self.classes, dtype=torch.float64)
        predicted = torch.empty_like(self._by_class, dtype=torch.bool)
        for rows in self._pieces():
            probability, target, counted = self._pairs(p, rows)
            images[3, rows], images[4, rows] = self._losses(p, rows, target, counted)
            images[5, rows] = counted.sum(0)
            images[6:, rows] = self._gaps(p, probability, target, counted)
            labels = self._by_class[:, rows]
            predicted[:, rows] = (probability >= 0.5).logical_and_(labels >= 0)
            said, true = predicted[:, rows].double(), (labels == 1).double()
            for row, each in enumerate((said * true, said, true)):
                classes[row] += each.sum(1)
                images[row, rows] = each.sum(0)
        loss, divisor, pairs = images[3:6]
        nll, ece = _ratio(loss, divisor, leave_out), _calibration_error(images[6:], pairs, leave_out)
        return self._of_decisions(predicted, classes, images[:3], leave_out) | {"nll": nll, "ece": ece}

    def _of_decisions(self, predicted, classes, images, leave_out):
        """Precision, recall and F1, as _of_sums.

        predicted: bool [C, N]. classes, images: how many pairs of each class, [3, C], and of each image, [3, N], are
        found, predicted and actual.
        """
        found, said, true = images
        result = {
            "precision_micro": _ratio(found, said, leave_out, 1),
            "recall_micro": _ratio(found, true, leave_out, 1),
            "f1_micro": _ratio(2 * found, said + true, leave_out, 1),
        }
        found, said, true = classes
        macro = _three(found, said, true)  # [3, C]
        scores, left_out = macro.mean(1), [None] * 3
        if leave_out:
            # What leaving out one image of each kind adds to a class: one that is only predicted, only so, or both.
            only_said, only_true, hit = (
                (_three(found - a, said - b, true - c) - macro) / self.classes
                for a, b, c in ((0, 1, 0), (0, 0, 1), (1, 1, 1))
            )
            left_out = scores.unsqueeze(1).repeat(1, len(self.labels))
            for rows in self._pieces():
                told, actual = predicted[:, rows].double(), (self._by_class[:, rows] == 1).double()
                left_out[:, rows] += only_said @ told + only_true @ actual
                left_out[:, rows] += (hit - only_said - only_true) @ told.mul_(actual)
        for name, score, without in zip(("precision", "recall", "f1"), scores, left_out, strict=True):
            result[f"{name}_macro"] = (score, without, None)
        return result

    def average_precisions(self):
        """Average precision of every class, float64 [P, C] on the CPU; NaN where there is no positive image."""
        if self._precisions is None:
            self._class_mean(slice(None), False)
        return self._precisions.cpu().masked_fill(~self.finite.cpu().unsqueeze(1), torch.nan)

    def _class_mean(self, probes, leave_out):
        """The mean over the classes that have a positive image: of probes, and without each image."""
        if self._precisions is None:
            self._precisions = self._logits.new_full((len(self._logits), self.classes), torch.nan, dtype=torch.float64)
        positives = (self.labels == 1).sum(0)
        changes = self._logits.new_zeros(len(self._logits[probes]), len(self.labels), dtype=torch.float64)
        for c in positives.nonzero()[:, 0].tolist():
            labels, scores = self._by_class[c], self._logits[probes, c]
            known = (labels >= 0).nonzero()[:, 0]
            everywhere = len(known) == len(labels)
            scores, labels = (scores, labels) if everywhere else (scores[:, known], labels[known])
            self._precisions[probes, c], change = average_precision(scores, labels == 1, leave_out)
            if leave_out:
                changes = changes.add_(change) if everywhere else changes.index_add_(1, known, change)
        count, total = (positives > 0).sum(), self._precisions[probes].nansum(1)
        if not leave_out:
            return total / count, None, None
        # Without its only positive a class is not there.
        alone = ((self.labels == 1) & (positives == 1)).sum(1)
        return total / count, (total.unsqueeze(1) + changes) / (count - alone), None


def _three(found, said, true):
    """Precision, recall and F1 [3, C] of whole numbers [C], so that the clamps only turn 0 / 0 into 0."""
    return torch.stack([
        found / said.clamp(min=1), found / true.clamp(min=1), 2 * found / (said + true).clamp(min=1)
    ])  # fmt: skip


TALLIES = {"multi-label": MultiLabelTally, "single-label": SingleLabelTally}
