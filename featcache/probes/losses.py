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
        # The slices of a stack come with the same labels one after another.
        if self._held[0] is not labels or self._held[1] != logits.dtype:
            self._held = (
                labels,
                logits.dtype,
                self._formula(labels)[0](self._read(labels), logits, self.loss, self.weights),
            )
        return self._formula(labels)[1](logits, *self._held[2])

    def targets(self, labels, dtype):
        """What the loss makes of labels, as its function of targets returns it."""
        like = torch.zeros(len(labels), 1, self.classes, dtype=dtype, device=labels.device)
        return self._formula(labels)[0](self._read(labels), like, self.loss, self.weights)

    def _formula(self, labels):
        single = self.loss.type == "ce" and labels.ndim == 1
        return (ce_single_targets, ce_single) if single else LOSSES[self.loss.type]

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


def bce_targets(labels, logits, loss, weights=None):
    """The targets of bce, what each adds to the mean, both [B, 1, C] in the logits' dtype, and the weights.

    The target is t = (1 - s) max(label, off) + s / C with off_label and label_smoothing s, both as in
    How-to-Probe.
    """
    known = _shares(labels, logits)
    targets = _present(labels, logits)
    if loss.off_label:
        classes = logits.shape[2]
        targets = targets.clamp_(min=1 / classes if loss.off_label == UNIFORM_TARGET else loss.off_label)
    if loss.label_smoothing:
        targets = targets.mul_(1 - loss.label_smoothing).add_(loss.label_smoothing / logits.shape[2])
    return targets, known, None if weights is None else weights.to(logits)


def bce(logits, targets, known, weights):
    """Binary cross-entropy with logits, the mean over the classes and images that are not ignored.

    Class weights multiply the positive part, t log(p), as torch's pos_weight.
    """
    p = logits.sigmoid()
    # max(z, 0) - t z - log(max(p, 1 - p)): where p nears 1 its logarithm has lost what the sum does not show.
    losses = p.sub(0.5).abs_().add_(0.5).log_().neg_()
    if weights is None:
        losses.add_(logits.clamp(min=0)).addcmul_(targets, logits, value=-1)
        return losses.mul_(known).sum((0, 2)), p.sub_(targets).mul_(known)
    # (1 - t) z + (1 + (w - 1) t) log(1 + exp(-z))
    factor = 1 + (weights - 1) * targets
    losses.add_((-logits).clamp_(min=0)).mul_(factor).addcmul_(1 - targets, logits)
    return losses.mul_(known).sum((0, 2)), (1 - targets - factor * (1 - p)).mul_(known)


def ce_targets(labels, logits, loss, weights=None):
    """The targets of ce over the count of images [B, 1, C], their sums [B, 1, 1], what is ignored [B, 1, C] or None.

    A multi-label image spreads its target evenly over the classes present (Mahajan et al., ECCV 2018);
    ignored classes leave the softmax and get no smoothing; an image without a class adds nothing but counts.
    """
    present = (labels > 0).to(logits.dtype)
    targets = present / present.sum(1, keepdim=True).clamp(min=1)  # [B, C]
    some = present.amax(1, keepdim=True)  # [B, 1]
    if loss.label_smoothing:
        known = (labels >= 0).to(logits.dtype)
        even = some * known / known.sum(1, keepdim=True).clamp(min=1)
        targets = (1 - loss.label_smoothing) * targets + loss.label_smoothing * even
    count, mass = len(labels), some
    if weights is not None:
        weights = weights.to(logits)
        targets = targets * weights
        mass = targets.sum(1, keepdim=True)
    ignored = None
    # Not asked on a GPU, which would have to be waited for.
    if labels.device.type != "cpu" or (labels < 0).any():
        ignored = _classes_first(labels < 0)
    return _classes_first(targets / count), (mass / count).unsqueeze(2), ignored


def ce(logits, targets, mass, ignored):
    """Softmax cross-entropy, torch's with label_smoothing and class weights w: -sum w_c t_c log(p_c) over classes.

    The mean is over images.
    """
    if ignored is not None:
        logits = logits.masked_fill(ignored, IGNORED)
    # As the logits lie in memory, for else the softmax copies them to and fro.
    logs = logits.permute(1, 2, 0).log_softmax(dim=1).permute(2, 0, 1)
    loss = -(targets * logs).sum((0, 2))
    return loss, logs.exp_().mul_(mass).sub_(targets)


def ce_single_targets(labels, logits, loss, weights=None):
    """As ce_targets, of single-label data, without a matrix: labels [1, 1, B], the target of each image's class
    [1, 1, B], that of every class by label_smoothing [1, C, 1] or None, and their sums [1, 1, B].

    Targets are over the count of images, each counted by the weight of its class.
    """
    smoothing, classes = loss.label_smoothing, logits.shape[2]
    each = logits.new_ones(classes) if weights is None else weights.to(logits)
    chosen = each[labels]
    count = chosen.sum()
    own, even = (1 - smoothing) * chosen / count, smoothing * each / classes / count
    return labels.view(1, 1, -1), own.view(1, 1, -1), even.view(1, -1, 1) if smoothing else None, own + even.sum()


def ce_single(logits, labels, own, even, mass):
    """As ce, of single-label data."""
    logs = logits.permute(1, 2, 0).log_softmax(dim=1)  # [P, C, B], as the logits lie in memory.
    labels, own = labels.expand(len(logs), 1, -1), own.expand(len(logs), 1, -1)
    loss = -(logs.gather(1, labels) * own).sum((1, 2))
    if even is not None:
        loss -= (logs * even).sum((1, 2))
    gradient = logs.exp_().mul_(mass)
    if even is not None:
        gradient.sub_(even)
    return loss, gradient.scatter_add_(1, labels, -own).permute(2, 0, 1)


def focal_targets(labels, logits, loss, weights=None):
    """The signs of focal, what each label adds to the mean, both [B, 1, C], and gamma."""
    sign = _present(labels, logits) * 2 - 1
    return sign, _shares(labels, logits) * (0.5 + (loss.alpha - 0.5) * sign), loss.gamma


def focal(logits, sign, share, gamma):
    """Sigmoid focal loss (Lin et al., ICCV 2017), the mean over the classes and images that are not ignored.

    -a (1 - q)^gamma log(q) with q the probability of what is true, and a = alpha for positives, 1 - alpha
    for negatives, as torchvision.ops.sigmoid_focal_loss.
    """
    losses, gradient = _focused(logits * sign, gamma)
    return losses.mul_(share).sum((0, 2)), gradient.mul_(share * sign)


def asymmetric_targets(labels, logits, loss, weights=None):
    """What is positive, what each label adds to the mean, both [B, 1, C], and the loss's numbers."""
    return _present(labels, logits) > 0, _shares(labels, logits), loss


def asymmetric(logits, positive, share, loss):
    """Asymmetric loss (Ridnik et al., ICCV 2021), the mean over the classes and images that are not ignored.

    Positives: -(1 - p)^gamma_pos log(p). Negatives: -m^gamma_neg log(1 - m) with m = max(p - clip, 0). The
    gradient is the whole one of the paper's section 2.4; the authors' code takes the powers as constants by default.
    """
    losses, gradient = _focused(logits, loss.gamma_pos)
    absent, slope = _shifted(logits, loss.gamma_neg, loss.clip)
    losses, gradient = torch.where(positive, losses, absent), torch.where(positive, gradient, slope)
    return losses.mul_(share).sum((0, 2)), gradient.mul_(share)


def _present(labels, logits):
    """Which classes an image has, 1 or 0 in the logits' dtype, [B, 1, C]."""
    if labels.ndim == 2:
        return (_classes_first(labels) > 0).to(logits.dtype)
    # Classes before images in memory, as logits lie.
    present = logits.new_zeros(logits.shape[2], len(labels))
    return present.scatter_(0, labels.unsqueeze(0), 1).t().unsqueeze(1)


def _classes_first(values):
    """View [B, C] as [B, 1, C], with classes before images in memory, as logits lie."""
    return values.t().contiguous().t().unsqueeze(1)


def _shares(labels, logits):
    """What each label adds to a mean over those that are not ignored: 0, or one over their number; [B, 1, C] or one."""
    if labels.ndim == 1:
        return logits.new_full((1, 1, 1), 1 / (len(labels) * logits.shape[2]))
    known = (_classes_first(labels) >= 0).to(logits.dtype)
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


LOSSES = {
    "bce": (bce_targets, bce),
    "ce": (ce_targets, ce),
    "focal": (focal_targets, focal),
    "asymmetric": (asymmetric_targets, asymmetric),
}
