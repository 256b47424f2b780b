"""Mean average precision as PASCAL VOC defines it: from the envelope of the precision."""

from typing import Literal

import torch
from torch import Tensor

from featcache.probes.scores.envelope import interpolated_precision
from featcache.probes.scores.evidence import Logits
from featcache.probes.scores.jackknife import without_each_group
from featcache.probes.scores.metric import Estimate, Metric


class _Interpolated(Metric[Logits]):
    tasks = ("multi-label",)
    on_request = True
    reads = Logits

    @staticmethod
    def reading(hits: Tensor, envelope: Tensor, positives: Tensor) -> Tensor:
        """Read the average precision off the envelope: see envelope.Reading."""
        raise NotImplementedError

    def estimate(self, evidence: Logits, leave_out: bool) -> Estimate:
        """Return the means over classes with a positive image, and with leave_out those without each group of images."""
        probes, classes, images = evidence.logits.shape
        device = evidence.logits.device
        precisions = torch.full((probes, classes), torch.nan, dtype=torch.float64, device=device)
        groups = torch.zeros(images, dtype=torch.int64, device=device)
        masks = without_each_group(images) if leave_out else []
        for number, mask in enumerate(masks):
            groups[~mask.to(device)] = number
        left_out = precisions.new_full((probes, classes, len(masks)), torch.nan)
        for c in (evidence.labels == 1).any(1).nonzero()[:, 0].tolist():
            known = evidence.labels[c] >= 0
            labels, own = evidence.labels[c][known] == 1, groups[known]
            present = own.unique()
            # A group all of whose labels are unknown changes nothing.
            own = torch.searchsorted(present, own)
            for p in range(probes):
                value, without = interpolated_precision(
                    evidence.logits[p, c][known], labels, self.reading, own if leave_out else None
                )
                precisions[p, c] = value
                if without is not None:
                    left_out[p, c] = value
                    left_out[p, c, present] = without
        scores = precisions.nanmean(1)
        return Estimate(scores, left_out.nanmean(1) if leave_out else None, by_class=precisions)


class EnvelopeAveragePrecision(_Interpolated):
    """The mean over classes with a positive image of the area under the precision envelope, as VOC2010 and VISSL have it."""

    type: Literal["map_voc10"] = "map_voc10"
    aliases = ("map_vissl", "map_voc2010", "map_envelope")
    title = "mAP (VOC2010)"
    class_column = "ap_voc10"

    @staticmethod
    def reading(hits: Tensor, envelope: Tensor, positives: Tensor) -> Tensor:
        """Return the mean of the envelope at each positive, which is the area under it."""
        return envelope.clamp(min=0).sum(-1) / positives


class ElevenPointAveragePrecision(_Interpolated):
    """The mean over classes with a positive image of the precision envelope at 11 recalls, as VOC2007 has it."""

    type: Literal["map_voc07"] = "map_voc07"
    aliases = ("map_voc2007", "map_11_point")
    title = "mAP (VOC2007, 11 points)"
    class_column = "ap_voc07"

    @staticmethod
    def reading(hits: Tensor, envelope: Tensor, positives: Tensor) -> Tensor:
        """Return the mean of the envelope at recalls 0, 0.1, ..., 1."""
        tenths = torch.arange(11, device=hits.device)
        # In whole numbers, so that a recall of 3/10 is no less than 0.3.
        reached = 10 * hits.unsqueeze(-1) >= tenths * positives.view(*positives.shape, 1, 1)  # [..., K, 11]
        return (envelope.clamp(min=0).unsqueeze(-1) * reached).amax(-2).mean(-1)
