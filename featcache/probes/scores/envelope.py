"""The precision envelope of PASCAL VOC: at each recall, the largest precision at that recall or a higher one."""

from collections.abc import Callable

import torch
from torch import Tensor

# From the positives that are retrieved [..., K] (rising), the envelope there [..., K] and the number of positives
# [...] to a score [...].
Reading = Callable[[Tensor, Tensor, Tensor], Tensor]


def interpolated_precision(
    logits: Tensor, labels: Tensor, reading: Reading, groups: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the interpolated average precision of one class for one probe, float64 [].

    logits: [n]. labels: bool [n], at least one of them true. groups: int64 [n], a group of each image from 0, all of
    which occur; with them the second value is the score without each group, [G], NaN where no positive is left.
    Images with equal logits share a threshold, so that their order does not matter.
    """
    order = logits.double().argsort(descending=True)
    ranked, positive = -logits.double()[order], labels[order]
    thresholds = ranked[positive]
    # How many images and positives score at least as much as each positive.
    ends = torch.searchsorted(ranked, thresholds, right=True) - 1
    images, hits = ends + 1, positive.cumsum(0)[ends]
    value = _read(hits, images, hits[-1], reading)
    if groups is None:
        return value, None
    # The same numbers of each group alone, [G, n] and then [G, K].
    members = groups[order] == torch.arange(int(groups.max()) + 1, device=groups.device).unsqueeze(1)
    gone_images = members.cumsum(1)[:, ends]
    gone_hits = (members & positive).cumsum(1)[:, ends]
    left = hits - gone_hits
    counted = ~members[:, positive]
    without = _read(left, images - gone_images, left[:, -1], reading, counted)
    return value, without.masked_fill(left[:, -1] == 0, torch.nan)


def _read(hits: Tensor, images: Tensor, positives: Tensor, reading: Reading, counted: Tensor | None = None) -> Tensor:
    """Read a score off the envelope. counted: bool [..., K], the positives that are there, by default all."""
    precision = hits.double() / images.clamp(min=1)
    if counted is not None:
        precision = precision.masked_fill(~counted, -1)
    envelope = precision.flip(-1).cummax(-1).values.flip(-1)
    if counted is not None:
        envelope = envelope.masked_fill(~counted, -1)
    return reading(hits, envelope, positives)
