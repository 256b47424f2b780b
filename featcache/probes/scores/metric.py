"""What a metric is, and the simple way to write one: a function of logits and labels."""

import re
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from featcache.errors import BadInput
from featcache.kinds import Kind
from featcache.probes.scores.evidence import Evidence, Gathered
from featcache.probes.scores.jackknife import FRACTION, without_each_group

Task = Literal["multi-label", "single-label"]
# Scores may leave their bounds by rounding.
ROUNDING = 1e-6
E = TypeVar("E", bound=Evidence)


@dataclass(frozen=True, eq=False)
class Estimate:
    """Scores of p probes, float64 [p].

    left_out: the scores without each image [p, N], or without each group of images, or None where they were not asked
    for. counts: how many images or decisions each score is a share of, float64 [p]; None for the images.
    by_class: the scores of the single classes [p, C], NaN for a class without one, or None.
    """

    scores: Tensor
    left_out: Tensor | None = None
    counts: Tensor | None = None
    by_class: Tensor | None = None


class Metric(Kind, Generic[E]):
    """Base of all metrics.

    title: its name in tables and plots, by default that which users choose it by. tasks: the labels that it is for.
    higher_is_better: whether the higher of two scores is the better. bounds: between which all scores lie; those
    between 0 and 1 are shown as percent. class_column: the column of scores_per_class.csv for the scores by class, or
    None where there are none. reads: the kind of evidence that `estimate` takes.
    """

    title: ClassVar[str] = ""
    tasks: ClassVar[tuple[Task, ...]] = ("multi-label", "single-label")
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = FRACTION
    class_column: ClassVar[str | None] = None
    reads: ClassVar[type[Evidence]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Raise ValueError for a metric that could not be chosen or scored. Its title is by default its name.

        Grids and rules such as "best map per loss" know no capitals.
        """
        name = cls.model_fields["type"].default
        if not isinstance(name, str):
            return
        if not re.fullmatch("[a-z0-9_]+", name):
            raise ValueError(f"{name!r} is no name of a metric: use a to z, 0 to 9 and _")
        if not isinstance(cls.tasks, tuple) or not set(cls.tasks) <= set(get_args(Task)):
            raise ValueError(
                f"tasks of metric {name}: expected a tuple of {' and '.join(get_args(Task))}, not {cls.tasks!r}"
            )
        if not hasattr(cls, "reads"):
            raise ValueError(f"metric {name} does not say which evidence it reads: subclass PlainMetric, or give reads")
        if "title" not in cls.__dict__:
            cls.title = name

    def estimate(self, evidence: E, leave_out: bool) -> Estimate:
        """Return the scores of the evidence's probes, and with leave_out also those without each image."""
        raise NotImplementedError

    def chance(self, labels: Tensor, classes: int) -> float | None:
        """Return the expected score of a random ranking, or None where a ranking alone does not decide the score.

        labels: int8 [N, C] or int64 [N]. classes: C.
        """
        return None

    @classmethod
    def unit(cls) -> str:
        """Return the unit in which scores are shown: "%" for fractions, else nothing."""
        return "%" if cls.bounds == FRACTION else ""


class PlainMetric(Metric[Gathered]):
    """Base of metrics that are a function of logits and labels. docs/scores.md has an example.

    The intervals come from computing `value` anew without each of up to 100 groups of images.
    """

    reads = Gathered

    def value(self, gathered: Tensor, labels: Tensor) -> Tensor:
        """Return the scores [P] of P probes on n images.

        gathered: logits float32 [P, n, C], or what `gather` makes of them. labels: int8 [n, C] (1 present, 0 absent,
        -1 not known) or int64 [n]. Each probe's score must depend on its own logits alone.
        """
        raise NotImplementedError

    def gather(self, logits: Tensor, labels: Tensor, softmax: Tensor) -> Tensor:
        """Return what is kept of a chunk of n images until all are seen: [P, n, ...], by default the logits.

        Override it to keep less, or to know how each probe turns logits into probabilities. logits: float32 [P, n, C].
        labels: of these images. softmax: bool [P], the others give sigmoids. Other metrics read the same tensors: do not
        change them in place.
        """
        return logits

    def estimate(self, evidence: Gathered, leave_out: bool) -> Estimate:
        """Return the scores, and with leave_out also those without each group of images."""
        # A copy, in case `value` changes it in place.
        scores = self._value(evidence.values.clone(), evidence.labels)
        if not leave_out:
            return Estimate(scores)
        if len(evidence.labels) == 1:
            return Estimate(scores, torch.full_like(scores, torch.nan).unsqueeze(1))
        masks = [mask.to(evidence.labels.device) for mask in without_each_group(len(evidence.labels))]
        left_out = [self._value(evidence.values[:, mask], evidence.labels[mask]) for mask in masks]
        return Estimate(scores, torch.stack(left_out, dim=1))

    def _value(self, gathered: Tensor, labels: Tensor) -> Tensor:
        """Return `value` as float64. Raises BadInput unless it is one score for each probe, within the bounds."""
        scores, (low, high) = self.value(gathered, labels), self.bounds
        if not isinstance(scores, Tensor) or scores.shape != gathered.shape[:1]:
            raise BadInput(
                f"metric {self.type}: value() returned {_shape(scores)}; it must return a tensor of one score for each "
                f"probe, here of shape [{len(gathered)}]"
            )
        scores = scores.double()
        outside = scores[(scores < low - ROUNDING) | (scores > high + ROUNDING)]
        if len(outside):
            raise BadInput(
                f"metric {self.type}: value() returned {outside[0].item():g}, which is not between {low:g} and {high:g}; "
                "give its class the right bounds, as in bounds = (0, math.inf)"
            )
        return scores.clamp(low, high)

    def checked_gather(self, logits: Tensor, labels: Tensor, softmax: Tensor) -> Tensor:
        """Return what `gather` does. Raises BadInput unless that has a row for each probe and image."""
        values = self.gather(logits, labels, softmax)
        if not isinstance(values, Tensor) or values.shape[:2] != logits.shape[:2]:
            raise BadInput(
                f"metric {self.type}: gather() returned {_shape(values)}; it must return a tensor that begins with "
                f"probes and images, here with shape {list(logits.shape[:2])}"
            )
        return values


def _shape(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
