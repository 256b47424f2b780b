"""Losses of many probes at once, in closed form.

Each takes logits [B, P, C] and labels that all probes share, and returns the mean loss of every
probe, [P], and the gradient of the sum of those losses, [B, P, C]. Labels are int8 [B, C] for
multi-label data (1, 0, and -1 where a class is to be ignored) or int64 [B] for single-label data.
"""

from torch.nn import functional as F

# Stands for minus infinity where a class is ignored: finite, so that 0 times it is 0.
IGNORED = -1e30


def bce(logits, labels):
    """Binary cross-entropy with logits, the mean over the classes and images that are not ignored."""
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[2])
    # Classes before images in memory, as the logits of a linear stack lie.
    labels = labels.t().contiguous().t().unsqueeze(1)  # [B, 1, C]
    known = (labels >= 0).to(logits.dtype)
    known /= known.sum().clamp(min=1)
    targets = (labels > 0).to(logits.dtype)
    # max(z, 0) - t z + log(1 + exp(-|z|)); log1p would be exact where the sum does not show it, and
    # is many times slower.
    losses = logits.abs().neg_().exp_().add_(1).log_()
    losses.add_(logits.clamp(min=0)).addcmul_(targets, logits, value=-1)
    return losses.mul_(known).sum((0, 2)), logits.sigmoid().sub_(targets).mul_(known)


def ce(logits, labels):
    """Softmax cross-entropy, the mean over images.

    A multi-label image spreads its target evenly over the classes present (Mahajan et al., ECCV
    2018); ignored classes leave the softmax; an image without a class adds nothing but counts.
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[2])
    present = (labels > 0).to(logits.dtype)
    some = present.sum(1, keepdim=True)  # [B, 1]
    targets = (present / some.clamp(min=1)).unsqueeze(1)  # [B, 1, C]
    if (labels < 0).any():
        logits = logits.masked_fill((labels < 0).unsqueeze(1), IGNORED)
    logs = logits.log_softmax(dim=2)
    gradient = (logs.exp() * some.clamp(max=1).unsqueeze(2) - targets) / len(logits)
    return -(targets * logs).sum(2).mean(0), gradient


LOSSES = {"bce": bce, "ce": ce}
