"""Losses of many probes at once, in closed form.

Each is a function of logits [B, P, C] and labels that all probes share, and returns the mean loss of every
probe, [P], and the gradient of the sum of those losses, [B, P, C]. Labels are int8 [B, C] for
multi-label data (1, 0, and -1 where a class is difficult) or int64 [B] for single-label data, which all
losses but ce read as one-hot.
"""

import torch
from torch.nn import functional as F

from featcache.probes.spec import UNIFORM_TARGET

# Stands for minus infinity where a class is ignored: finite, so that 0 times it is 0.
IGNORED = -1e30


class LossFunction:
    """A spec.Loss as a function. labels: of the whole training set, of which `balanced` counts the classes."""

    def __init__(self, loss, labels, classes):
        self.loss, self.classes = loss, classes
        self._held = None, None, None
        self.weights = class_weights(loss, labels, classes) if loss.class_weights == "balanced" else None

    def __call__(self, logits, labels):
        """Return the mean loss of every probe, [P], and its gradient, [B, P, C]."""
        if self.loss.type != "bce":
            return LOSSES[self.loss.type](logits, self._read(labels), self.loss, self.weights)
        # The slices of a stack come with the same labels one after another.
        if self._held[0] is not labels or self._held[1] != logits.dtype:
            self._held = labels, logits.dtype, bce_targets(self._read(labels), logits, self.loss)
        return bce(logits, *self._held[2], self.weights)

    def count(self, labels):
        """What the mean over these labels divides by, so that means of parts can be put together."""
        labels = self._read(labels)
        if self.loss.type == "ce":
            weighed = self.weights is not None and labels.ndim == 1
            return float(self.weights[labels].sum()) if weighed else len(labels)
        return int((labels >= 0).sum()) if labels.ndim == 2 else len(labels) * self.classes

    def _read(self, labels):
        return labels.clamp(min=0) if self.loss.difficult == "negative" and labels.ndim == 2 else labels


def class_weights(loss, labels, classes):
    """Weights [C], float64, of classes by how rare they are.

    For ce N / (C n_c), scikit-learn's `balanced`, with n_c the rows of class c of N (of multi-label data the
    labels of class c, of N labels in all); for bce the weight of a class's positives, negatives over positives.
    A class that would get 0 or infinity, for want of the one or the other, gets 1. Ignored labels do not count.
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, classes)
    positives = (labels > 0).sum(0).double()
    if loss.type == "ce":
        weights = positives.sum() / (classes * positives)
    else:
        negatives = (labels == 0 if loss.difficult == "ignored" else labels <= 0).sum(0).double()
        weights = negatives / positives
    return torch.where(torch.isfinite(weights) & (weights > 0), weights, 1.0)


def bce_targets(labels, logits, loss):
    """The targets of bce and what each adds to the mean, [B, 1, C] in the logits' dtype.

    The target is t = (1 - s) max(label, off) + s / C with off_label and label_smoothing s, both as in
    How-to-Probe.
    """
    labels = _by_class(labels, logits)  # [B, 1, C]
    known = _shares(labels, logits)
    targets = (labels > 0).to(logits.dtype)
    if loss.off_label:
        classes = logits.shape[2]
        targets = targets.clamp_(min=1 / classes if loss.off_label == UNIFORM_TARGET else loss.off_label)
    if loss.label_smoothing:
        targets = targets.mul_(1 - loss.label_smoothing).add_(loss.label_smoothing / logits.shape[2])
    return targets, known


def bce(logits, targets, known, weights=None):
    """Binary cross-entropy with logits, the mean over the classes and images that are not ignored.

    targets, known: see bce_targets. Class weights multiply the positive part, t log(p), as torch's pos_weight.
    """
    # max(z, 0) - t z + log(1 + exp(-|z|)); log1p would be exact where the sum does not show it, and
    # is many times slower.
    losses = logits.abs().neg_().exp_().add_(1).log_()
    if weights is None:
        losses.add_(logits.clamp(min=0)).addcmul_(targets, logits, value=-1)
        return losses.mul_(known).sum((0, 2)), logits.sigmoid().sub_(targets).mul_(known)
    # (1 - t) z + (1 + (w - 1) t) log(1 + exp(-z))
    factor = 1 + (weights.to(logits) - 1) * targets
    losses.add_((-logits).clamp_(min=0)).mul_(factor).addcmul_(1 - targets, logits)
    return losses.mul_(known).sum((0, 2)), (1 - targets - factor * (-logits).sigmoid_()).mul_(known)


def ce(logits, labels, loss, weights=None):
    """Softmax cross-entropy, torch's with label_smoothing and class weights w: -sum w_c t_c log(p_c) over classes.

    The mean is over images, for single-label data with each image counted by the weight of its class. A
    multi-label image spreads its target evenly over the classes present (Mahajan et al., ECCV 2018);
    ignored classes leave the softmax and get no smoothing; an image without a class adds nothing but counts.
    """
    single = labels.ndim == 1
    if single:
        labels = F.one_hot(labels, logits.shape[2])
    present = (labels > 0).to(logits.dtype)
    targets = present / present.sum(1, keepdim=True).clamp(min=1)  # [B, C]
    some = present.amax(1, keepdim=True)  # [B, 1]
    if loss.label_smoothing:
        known = (labels >= 0).to(logits.dtype)
        even = some * known / known.sum(1, keepdim=True).clamp(min=1)
        targets = (1 - loss.label_smoothing) * targets + loss.label_smoothing * even
    count, mass = len(logits), some
    if weights is not None:
        weights = weights.to(logits)
        targets = targets * weights
        count, mass = (present @ weights).sum() if single else count, targets.sum(1, keepdim=True)
    if (labels < 0).any():
        logits = logits.masked_fill((labels < 0).unsqueeze(1), IGNORED)
    targets = (targets / count).unsqueeze(1)  # [B, 1, C]
    logs = logits.log_softmax(dim=2)
    gradient = logs.exp() * (mass / count).unsqueeze(2) - targets
    return -(targets * logs).sum((0, 2)), gradient


def focal(logits, labels, loss, weights=None):
    """Sigmoid focal loss (Lin et al., ICCV 2017), the mean over the classes and images that are not ignored.

    -a (1 - q)^gamma log(q) with q the probability of what is true, and a = alpha for positives, 1 - alpha
    for negatives, as torchvision.ops.sigmoid_focal_loss.
    """
    labels = _by_class(labels, logits)
    share = _shares(labels, logits)
    sign = (labels > 0).to(logits.dtype) * 2 - 1
    share = share * (0.5 + (loss.alpha - 0.5) * sign)
    losses, gradient = _focused(logits * sign, loss.gamma)
    return losses.mul_(share).sum((0, 2)), gradient.mul_(share * sign)


def asymmetric(logits, labels, loss, weights=None):
    """Asymmetric loss (Ridnik et al., ICCV 2021), the mean over the classes and images that are not ignored.

    Positives: -(1 - p)^gamma_pos log(p). Negatives: -m^gamma_neg log(1 - m) with m = max(p - clip, 0). The
    gradient is the whole one of the paper's section 2.4; the authors' code takes the powers as constants by default.
    """
    labels = _by_class(labels, logits)
    share = _shares(labels, logits)
    positive = labels > 0
    losses, gradient = _focused(logits, loss.gamma_pos)
    absent, slope = _shifted(logits, loss.gamma_neg, loss.clip)
    losses, gradient = torch.where(positive, losses, absent), torch.where(positive, gradient, slope)
    return losses.mul_(share).sum((0, 2)), gradient.mul_(share)


def _by_class(labels, logits):
    """Labels as [B, 1, C], with classes before images in memory, as the logits of a linear stack lie."""
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[2])
    return labels.t().contiguous().t().unsqueeze(1)


def _shares(labels, logits):
    """What each label adds to a mean over those that are not ignored: 0, or one over their number."""
    known = (labels >= 0).to(logits.dtype)
    return known.div_(known.sum().clamp(min=1))


def _focused(logits, gamma):
    """Values of -(1 - q)^gamma log(q), q = sigmoid(logits), and their derivatives."""
    log = F.softplus(-logits)
    other = (-logits).sigmoid_()  # 1 - q
    power = other.pow(gamma)
    return power * log, -power * (gamma * (1 - other) * log + other)


def _shifted(logits, gamma, clip):
    """Values of -m^gamma log(1 - m), m = max(sigmoid(logits) - clip, 0), and their derivatives."""
    p, rest = logits.sigmoid(), (-logits).sigmoid_()
    if not clip:
        log = F.softplus(logits)
        power = p.pow(gamma)
        return power * log, power * (p + gamma * rest * log)
    kept = (rest + clip).clamp_(max=1)  # 1 - m
    log, power = -kept.log(), (1 - kept).pow(gamma)
    # m^(gamma - 1) has no end at 0, where the derivative is 0 all the same.
    steep = gamma * (1 - kept).clamp_(min=1e-30).pow(gamma - 1) * log
    return power * log, torch.where(kept < 1, p * rest * (power / kept + steep), 0.0)


LOSSES = {"ce": ce, "focal": focal, "asymmetric": asymmetric}
