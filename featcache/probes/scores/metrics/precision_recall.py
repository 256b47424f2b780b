"""Precision, recall and F1 of the classes that are predicted at a probability of 0.5 or more.

Macro metrics are means over all classes; micro metrics divide sums over classes and images. 0 / 0 counts as 0.
"""

from typing import Literal

import torch
from torch import Tensor

from featcache.probes.scores.evidence import Decisions
from featcache.probes.scores.jackknife import ratio
from featcache.probes.scores.metric import Estimate, Metric


class _DecisionMetric(Metric[Decisions]):
    tasks = ("multi-label",)
    reads = Decisions

    @staticmethod
    def terms(hits: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (numerator, denominator), from the numbers of right predictions, predictions and classes present."""
        raise NotImplementedError


class _Macro(_DecisionMetric):
    def estimate(self, evidence: Decisions, leave_out: bool) -> Estimate:
        hits, predicted, actual = evidence.class_hits, evidence.class_predicted, evidence.class_actual  # [p, C]
        by_class = self._of(hits, predicted, actual)
        scores = by_class.mean(1)
        if not leave_out:
            return Estimate(scores)
        # The score of a class with all images, and without one image of each code.
        fewer = (
            by_class,
            self._of(hits, predicted - 1, actual),
            self._of(hits, predicted, actual - 1),
            self._of(hits - 1, predicted - 1, actual - 1),
        )
        changes = (torch.stack(fewer, dim=2) - by_class.unsqueeze(2)) / by_class.shape[1]  # [p, C, 4]
        left_out = scores.unsqueeze(1).repeat(1, evidence.codes.shape[2])
        for rows in evidence.pieces:
            left_out[:, rows] += changes.gather(2, evidence.codes[:, :, rows].long()).sum(1)
        return Estimate(scores, left_out)

    def _of(self, hits: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
        upper, lower = self.terms(hits, predicted, actual)
        # The denominators are whole numbers, so that the clamp only turns 0 / 0 into 0.
        return upper / lower.clamp(min=1)


class _Micro(_DecisionMetric):
    def estimate(self, evidence: Decisions, leave_out: bool) -> Estimate:
        upper, lower = self.terms(evidence.hits, evidence.predicted, evidence.actual)
        return Estimate(*ratio(upper, lower, leave_out, least=1))


class _Precision(_DecisionMetric):
    @staticmethod
    def terms(hits: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        return hits, predicted


class _Recall(_DecisionMetric):
    @staticmethod
    def terms(hits: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        return hits, actual


class _F1(_DecisionMetric):
    @staticmethod
    def terms(hits: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * hits, predicted + actual


class MacroPrecision(_Precision, _Macro):
    """The mean over classes of the share of predictions that are right."""

    type: Literal["precision_macro"] = "precision_macro"
    title = "macro precision"


class MacroRecall(_Recall, _Macro):
    """The mean over classes of the share of their images that are predicted."""

    type: Literal["recall_macro"] = "recall_macro"
    title = "macro recall"


class MacroF1(_F1, _Macro):
    """The mean over classes of the harmonic mean of precision and recall."""

    type: Literal["f1_macro"] = "f1_macro"
    title = "macro F1"


class MicroPrecision(_Precision, _Micro):
    """The share of all predictions that are right."""

    type: Literal["precision_micro"] = "precision_micro"
    title = "micro precision"


class MicroRecall(_Recall, _Micro):
    """The share of all classes present in the images that are predicted."""

    type: Literal["recall_micro"] = "recall_micro"
    title = "micro recall"


class MicroF1(_F1, _Micro):
    """The harmonic mean of micro precision and micro recall."""

    type: Literal["f1_micro"] = "f1_micro"
    title = "micro F1"
