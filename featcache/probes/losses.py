"""Losses of many probes at once: logits [B, P, C] and shared labels in, one mean loss per probe [P] out.

Labels are int8 [B, C] for multi-label data (1, 0, and -1 where a class is to be ignored) or int64
[B] for single-label data.
"""

from torch.nn import functional as F

# Stands for minus infinity where a class is ignored: finite, so that 0 times it is 0.
IGNORED = -1e30


def bce(logits, labels):
    """Binary cross-entropy with logits, the mean over the classes and images that are not ignored."""
    classes = logits.shape[2]
    targets = F.one_hot(labels, classes) if labels.ndim == 1 else labels
    known = (targets >= 0).to(logits.dtype).unsqueeze(1)
    targets = (targets > 0).to(logits.dtype).unsqueeze(1).expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * known
    return losses.sum((0, 2)) / known.sum().clamp(min=1)


def ce(logits, labels):
    """Softmax cross-entropy, the mean over images.

    A multi-label image spreads its target evenly over the classes present (Mahajan et al., ECCV
    2018); ignored classes leave the softmax; an image without a class adds nothing but counts.
    """
    if labels.ndim == 1:
        flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none")
        return flat.view(logits.shape[:2]).mean(0)
    present = (labels > 0).to(logits.dtype)
    targets = present / present.sum(1, keepdim=True).clamp(min=1)
    if (labels < 0).any():
        logits = logits.masked_fill((labels < 0).unsqueeze(1), IGNORED)
    return -(targets.unsqueeze(1) * F.log_softmax(logits, dim=2)).sum(2).mean(0)


LOSSES = {"bce": bce, "ce": ce}
