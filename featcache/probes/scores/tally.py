"""What the metrics need to know of probes' logits, gathered chunk by chunk; and the metrics.

Every metric is known without any one image, too, from a pass over the images: average precision from one sort,
the others because they are functions of sums over images. Probabilities are those that a probe was
trained to give: the softmax for ce, the sigmoid for every other loss.
"""

import itertools

import torch
from torch.nn import functional as F

from featcache.probes.losses import IGNORED
from featcache.probes.scores.average_precision import average_precision
from featcache.probes.scores.jackknife import deviations, influences

BINS = 15
# Numbers that are passed over at a time: on a CPU they stay in the cache, on a GPU a step costs its launches.
AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 23}


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
        # How many numbers of an image the sums pass over.
        self._passed = BINS if labels.ndim == 1 else classes

    @torch.no_grad()
    def add(self, logits):
        """Take the logits float32 [P, n, C] of the next n images."""
        end = self._rows + logits.shape[1]
        # The extremes are so where all are, and NaN where one is.
        self.finite &= logits.amax((1, 2)).isfinite() & logits.amin((1, 2)).isfinite()
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
        for metric, (scores, left_out, counts) in self._found(leave_out, only):
            counts = scores.new_full(scores.shape, judged) if counts is None else counts.clamp(max=judged)
            parts.setdefault(metric, []).append(reduce(scores, left_out, counts))
        table = {m: [torch.cat(column).cpu() for column in zip(*rows, strict=True)] for m, rows in parts.items()}
        broken = ~self.finite.cpu()
        for columns in table.values():
            for column in columns:
                column[broken] = torch.nan
        return {metric: tuple(columns) for metric, columns in table.items()}

    def _found(self, leave_out, only):
        """Yield (metric, columns) of some probes at a time: what _of_sums gives."""
        if only in (None, self.class_mean):
            for probes in self._batches(len(self.labels)):
                yield self.class_mean, self._class_mean(probes, leave_out)
        if only != self.class_mean:
            for probes in self._batches(self._passed * len(self.labels)):
                yield from self._of_sums(probes, leave_out).items()

    def _batches(self, numbers):
        """Slices of the probes, each of one kind of probability. numbers: how many are passed over for a probe."""
        size = max(AT_ONCE[self.labels.device.type] // numbers, 1)
        starts = [p for p, kind in enumerate(self.softmax) if p == 0 or kind != self.softmax[p - 1]]
        for first, end in itertools.pairwise([*starts, len(self.softmax)]):
            yield from (slice(start, min(start + size, end)) for start in range(first, end, size))

    def _pieces(self):
        """Slices of the images, as many of all their classes as are passed over at a time."""
        size = max(AT_ONCE[self.labels.device.type] // self.classes, 64)
        return [slice(start, start + size) for start in range(0, len(self.labels), size)]

    def calibration(self):
        """Return float64 [P, BINS, 3] on the CPU: pairs in each bin of the confidence, sums of their confidences and
        outcomes. To be asked for after scores or estimates of all metrics, which count them.
        """
        return self._bins.cpu().masked_fill(~self.finite.cpu().view(-1, 1, 1), 0)

    def _gaps(self, probes, confidence, outcome, counted):
        """Sum, for each image and bin, confidence minus outcome over its pairs [p, K, n] that count: [p, BINS, n].

        Counts them for calibration(), too.
        """
        # The bin of a confidence c in [0, 1]: b from 0 where b / BINS < c <= (b + 1) / BINS.
        bins = confidence.mul(BINS).ceil_().long().sub_(1).clamp_(0, BINS - 1)
        gaps = confidence.new_zeros(len(bins), BINS, bins.shape[2])
        confidence, outcome = confidence * counted, outcome * counted
        gaps.scatter_add_(1, bins, confidence - outcome)
        # One probe after another in one row of bins.
        bins += BINS * torch.arange(len(bins), device=bins.device).view(-1, 1, 1)
        for column, numbers in enumerate((counted, confidence, outcome)):
            sums = gaps.new_zeros(len(bins) * BINS).index_add_(0, bins.flatten(), numbers.flatten())
            self._bins[probes, :, column] += sums.view(-1, BINS)
        return gaps


def _or_nan(counts):
    """Counts as float64, NaN for 0: where no class is left, rounding must not make a score of what is over it."""
    return counts.double().masked_fill(counts == 0, torch.nan)


def _ratio(upper, lower, leave_out, least=0):
    """The sums of upper over those of lower, both [p, n].

    Returns that of all images [p], without each of them [p, n] or None, and the sums of lower.

    least: 1 where lower sums whole numbers, which turns 0 / 0 into 0.
    """
    # Both at once, so that a lone probe's sum is made as those of many are.
    above, below = torch.stack([upper, lower]).sum(2)
    left_out = None
    if leave_out:
        left_out = (above.unsqueeze(1) - upper).div_((below.unsqueeze(1) - lower).clamp_(min=least))
    return above / below.clamp(min=least), left_out, below


def _calibration_error(gaps, pairs, leave_out):
    """The expected calibration error of gaps [p, BINS, n] in pairs [p, n], as _ratio."""
    total, count = gaps.sum(2), pairs.sum(1)
    left_out = None
    if leave_out:
        left_out = (total.unsqueeze(2) - gaps).abs_().sum(1) / (count.unsqueeze(1) - pairs)
    return total.abs().sum(1) / count, left_out, count


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

    def _of_sums(self, probes, leave_out):
        """{metric: (scores [p], without each image [p, N] or None, what they are shares of [p] or None)}."""
        rank, loss = self._rank[probes], self._loss[probes]
        hits, ones = (rank < 1).double(), torch.ones_like(loss)
        gaps = self._gaps(probes, *(rows.unsqueeze(1) for rows in (self._confidence[probes], hits, ones)))
        return {
            "top1": _ratio(hits, ones, leave_out),
            "top5": _ratio((rank < 5).double(), ones, leave_out),
            "nll": _ratio(loss, ones, leave_out),
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
        return total / count, left_out / _or_nan(count - (fewer == 0).long()), None


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

    def _pairs(self, probes, rows):
        """Probability [p, C, n], target and whether it counts [1, C, n] of every (class, image), float64.

        The softmax says how the classes present share one image: its target is 1 over their number, and
        images without a class do not count.
        """
        labels, logits = self._by_class[:, rows], self._logits[probes, :, rows].double()
        known, present = (labels >= 0).double().unsqueeze(0), (labels == 1).double().unsqueeze(0)
        if not self.softmax[probes.start]:
            return logits.sigmoid_(), present, known
        count = present.sum(1, keepdim=True)
        probability = logits.masked_fill_(labels < 0, IGNORED).softmax(1)
        return probability, present / count.clamp(min=1), known * (count > 0)

    def _losses(self, probes, rows, target, counted):
        """The loss of every image [p, n], and what divides it [1, n]. target, counted: see _pairs."""
        logits = self._logits[probes, :, rows].double()
        if not self.softmax[probes.start]:
            losses = F.softplus(logits, threshold=40).sub_(logits.mul_(target)).mul_(counted)
            return losses.sum(1), counted.sum(1)
        logs = logits.masked_fill_(self._by_class[:, rows] < 0, IGNORED).log_softmax(1)
        return logs.mul_(target).sum(1).neg_(), (counted.sum(1) > 0).double()

    def _of_sums(self, probes, leave_out):
        """{metric: (scores [p], without each image [p, N] or None, what they are shares of [p] or None)}."""
        shape = self._logits[probes].shape
        images = self._logits.new_empty(shape[0], 6 + BINS, shape[2], dtype=torch.float64)
        classes = self._logits.new_zeros(shape[0], 3, shape[1], dtype=torch.float64)
        # Of every (class, image): 1 if it is predicted, and 2 more if it is so.
        decisions = torch.empty(shape, dtype=torch.uint8, device=self._logits.device)
        for rows in self._pieces():
            probability, target, counted = self._pairs(probes, rows)
            images[:, 3, rows], images[:, 4, rows] = self._losses(probes, rows, target, counted)
            images[:, 5, rows] = counted.sum(1)
            images[:, 6:, rows] = self._gaps(probes, probability, target, counted.expand_as(probability))
            labels = self._by_class[:, rows]
            said = (probability >= 0.5).logical_and_(labels >= 0).double()
            true = (labels == 1).double().unsqueeze(0)
            decisions[:, :, rows] = said + 2 * true
            for row, each in enumerate((said * true, said, true)):
                classes[:, row] += each.sum(2)
                images[:, row, rows] = each.sum(1)
        loss, divisor, pairs = images[:, 3:6].unbind(1)
        nll, ece = _ratio(loss, divisor, leave_out), _calibration_error(images[:, 6:], pairs, leave_out)
        found, said, true = images[:, :3].unbind(1)
        return {
            "precision_micro": _ratio(found, said, leave_out, 1),
            "recall_micro": _ratio(found, true, leave_out, 1),
            "f1_micro": _ratio(2 * found, said + true, leave_out, 1),
            "nll": nll,
            "ece": ece,
        } | self._macro(decisions, classes, leave_out)

    def _macro(self, decisions, classes, leave_out):
        """Means over classes of precision, recall and F1, as _of_sums.

        decisions: see there. classes: how many images of each are found, predicted and actual, [p, 3, C].
        """
        found, said, true = classes.unbind(1)
        result = {}
        for name, of in DECIDED.items():
            each = of(found, said, true)  # [p, C]
            scores, left_out = each.mean(1), None
            if leave_out:
                # What a class adds without one image of each kind of decision.
                kinds = (each, of(found, said - 1, true), of(found, said, true - 1), of(found - 1, said - 1, true - 1))
                changes = (torch.stack(kinds, dim=2) - each.unsqueeze(2)) / self.classes  # [p, C, 4]
                left_out = scores.unsqueeze(1).repeat(1, decisions.shape[2])
                for rows in self._pieces():
                    left_out[:, rows] += changes.gather(2, decisions[:, :, rows].long()).sum(1)
            result[f"{name}_macro"] = (scores, left_out, None)
        return result

    def average_precisions(self):
        """Average precision of every class, float64 [P, C] on the CPU; NaN where there is no positive image."""
        if self._precisions is None:
            self._class_mean(slice(None), False)
        return self._precisions.cpu().masked_fill(~self.finite.cpu().unsqueeze(1), torch.nan)

    def _class_mean(self, probes, leave_out):
        """The mean over the classes that have a positive image: of probes, and without each image.

        What a class of K positives changes without an image is drawn in by sqrt(1 - 1 / K): average precision is a
        mean over the positives, of whose variance the jackknife says K / (K - 1) times as much.
        """
        if self._precisions is None:
            self._precisions = self._logits.new_full((len(self._logits), self.classes), torch.nan, dtype=torch.float64)
        positives = (self.labels == 1).sum(0)
        # Without its only positive a class is gone altogether.
        drawn_in = torch.where(positives > 1, 1 - 1 / positives.double(), 1).sqrt()
        changes = self._logits.new_zeros(len(self._logits[probes]), len(self.labels), dtype=torch.float64)
        for c in positives.nonzero()[:, 0].tolist():
            labels, scores = self._by_class[c], self._logits[probes, c]
            known = (labels >= 0).nonzero()[:, 0]
            everywhere = len(known) == len(labels)
            scores, labels = (scores, labels) if everywhere else (scores[:, known], labels[known])
            self._precisions[probes, c], change = average_precision(scores, labels == 1, leave_out)
            if leave_out:
                change *= drawn_in[c]
                changes = changes.add_(change) if everywhere else changes.index_add_(1, known, change)
        count, total = (positives > 0).sum(), self._precisions[probes].nansum(1)
        if not leave_out:
            return total / count, None, None
        # Without its only positive a class is not there.
        alone = ((self.labels == 1) & (positives == 1)).sum(1)
        return total / count, (total.unsqueeze(1) + changes) / _or_nan(count - alone), None


# Of whole numbers, so that the clamps only turn 0 / 0 into 0.
DECIDED = {
    "precision": lambda found, said, true: found / said.clamp(min=1),
    "recall": lambda found, said, true: found / true.clamp(min=1),
    "f1": lambda found, said, true: 2 * found / (said + true).clamp(min=1),
}
TALLIES = {"multi-label": MultiLabelTally, "single-label": SingleLabelTally}
