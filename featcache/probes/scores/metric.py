"""The base class of metrics, and PlainMetric, the simple way to write one as a function of logits and labels."""

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

    left_out: the scores without each image [p, N], or without each group of images; None where they were not asked for.
    counts: number of images or decisions that each score is a share of, float64 [p]; None if that is all images.
    by_class: the scores of the single classes [p, C], NaN for a class that has none; or None.
    """

    scores: Tensor
    left_out: Tensor | None = None
    counts: Tensor | None = None
    by_class: Tensor | None = None


class Metric(Kind, Generic[E]):
    """Base of all metrics.

    title: its name in tables and plots, by default the name that users choose it by. tasks: the kinds of labels that it
    can score. higher_is_better: whether higher scores are better. bounds: the lowest and highest possible score; scores
    between 0 and 1 are shown as percent. class_column: the column of scores_per_class.csv for its scores by class, None
    if it has none. on_request: whether only grids that choose by it have it computed. reads: the kind of evidence that
    `estimate` takes.
    """

    title: ClassVar[str] = ""
    tasks: ClassVar[tuple[Task, ...]] = ("multi-label", "single-label")
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = FRACTION
    class_column: ClassVar[str | None] = None
    on_request: ClassVar[bool] = False
    reads: ClassVar[type[Evidence]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Set the default title. Raises ValueError for a metric that could not be chosen or scored.

        Names have no capitals because grids and rules such as "best map per loss" are read in any case.
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
        """Return the scores of the probes in the evidence, and with leave_out also the scores without each image."""
        raise NotImplementedError

    def chance(self, labels: Tensor, classes: int) -> float | None:
        """Return the expected score of a random ranking, None for a score that depends on more than the ranking.

        labels: int8 [N, C] or int64 [N]. classes: C.
        """
        return None

    @classmethod
    def unit(cls) -> str:
        """Return the unit in which scores are shown: "%" for fractions, else nothing."""
        return "%" if cls.bounds == FRACTION else ""


class PlainMetric(Metric[Gathered]):
    """Base of metrics that are a plain function of logits and labels. docs/scores.md has an example.

    For intervals, `value` is computed again without each of up to 100 groups of images.
    """

    reads = Gathered

    def value(self, gathered: Tensor, labels: Tensor) -> Tensor:
        """Return the scores [P] of P probes on n images.

        gathered: logits float32 [P, n, C], or what `gather` returns. labels: int8 [n, C] (1 present, 0 absent,
        -1 unknown) or int64 [n]. Each probe's score must depend on its own logits alone.
        """
        raise NotImplementedError

    def gather(self, logits: Tensor, labels: Tensor, softmax: Tensor) -> Tensor:
        """Return what to keep from a chunk of n images until all are seen: [P, n, ...], by default the logits.

        Override it to keep less, or to see which probes give a softmax. logits: float32 [P, n, C]. labels: of these
        images. softmax: bool [P], False for sigmoids. Do not change the tensors in place: other metrics read them too.
        """
        return logits

    def estimate(self, evidence: Gathered, leave_out: bool) -> Estimate:
        """Return the scores, and with leave_out also the scores without each group of images."""
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
        """Call `gather`. Raises BadInput unless the result begins with the axes of probes and images."""
        values = self.gather(logits, labels, softmax)
        if not isinstance(values, Tensor) or values.shape[:2] != logits.shape[:2]:
            raise BadInput(
                f"metric {self.type}: gather() returned {_shape(values)}; it must return a tensor that begins with "
                f"probes and images, here with shape {list(logits.shape[:2])}"
            )
        return values


def _shape(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
