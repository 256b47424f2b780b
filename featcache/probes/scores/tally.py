"""Score many probes at once: their logits are gathered chunk by chunk, once for all metrics.

A single pass over the images also gives every metric without each one of them: average precision from one sort, the
others because they are functions of sums over images.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from featcache.probes.scores import gatherers
from featcache.probes.scores.evidence import Evidence
from featcache.probes.scores.gatherers import Gatherer, MetricGatherer, MultiLabelGatherer, SingleLabelGatherer
from featcache.probes.scores.jackknife import deviations, influences
from featcache.probes.scores.metric import Estimate, Metric, PlainMetric
from featcache.probes.scores.metrics import metric_kind, metrics_of

Reduce = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, ...]]


class Tally:
    """Scores of P probes on N images: `add` the logits in the order of the images, then ask for scores.

    labels: of all images, int8 [N, C] or int64 [N], on the device of the logits. classes: C. softmax: for each probe,
    whether its probabilities are a softmax rather than sigmoids. metrics: names of the metrics to compute, by default
    all of the task.

        tally = Tally(labels, classes=20, softmax=[False, False])
        for chunk in chunks:
            tally.add(chunk)  # float32 [2, n, 20]
        tally.scores()["map"]  # float64 [2]
    """

    def __init__(self, labels: Tensor, classes: int, softmax: Sequence[bool], metrics: Iterable[str] | None = None):
        self.labels, self.softmax = labels, list(softmax)
        self.finite = torch.ones(len(self.softmax), dtype=torch.bool, device=labels.device)
        self._rows = 0
        self._by_class: dict[str, Tensor] | None = None
        multi = labels.ndim == 2
        # Number of images that bear on a score: those that have a class.
        self._informative = int((labels == 1).any(1).sum()) if multi else len(labels)
        names = metrics_of("multi-label" if multi else "single-label") if metrics is None else metrics
        shared = MultiLabelGatherer if multi else SingleLabelGatherer
        self._shared: Gatherer | None = None
        # Metrics that read the same evidence are computed together.
        self._readers: dict[tuple[Gatherer, type[Evidence]], list[Metric]] = {}
        for metric in (metric_kind(name)(type=name) for name in names):
            if isinstance(metric, PlainMetric):
                gatherer: Gatherer = MetricGatherer(metric, labels, classes, self.softmax)
            else:
                gatherer = self._shared = self._shared or shared(labels, classes, self.softmax)
            self._readers.setdefault((gatherer, gatherer.offered(metric)), []).append(metric)
        self._gatherers = list(dict.fromkeys(gatherer for gatherer, _ in self._readers))

    @property
    def bytes_per_image(self) -> int:
        """Bytes that are kept for each image and probe."""
        return sum(gatherer.bytes_per_image() for gatherer in self._gatherers)

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """Take the logits float32 [P, n, C] of the next n images."""
        end = self._rows + logits.shape[1]
        # The extremes are finite where all are, and NaN where one is.
        self.finite &= logits.amax((1, 2)).isfinite() & logits.amin((1, 2)).isfinite()
        # Finite numbers can be sorted and summed. The scores of such probes are replaced by NaN in the end.
        logits = logits.nan_to_num() if not self.finite.all() else logits
        for gatherer in self._gatherers:
            gatherer.keep(logits, slice(self._rows, end))
        self._rows = end

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Return {metric: float64 [P]} on the CPU. A probe with a logit that is not finite scores NaN."""
        return {metric: scores for metric, (scores,) in self._table(lambda score, *_: (score,), False).items()}

    @torch.no_grad()
    def estimates(self) -> dict[str, tuple[Tensor, ...]]:
        """Return {metric: (scores, standard deviations, counts)}, each float64 [P] on the CPU: see jackknife.py.

        counts: number of images or decisions behind the score, at most that of the images that bear on it.
        """

        def reduce(score: Tensor, left_out: Tensor | None, count: Tensor) -> tuple[Tensor, ...]:
            return score, deviations(_influences(score, left_out)), count

        return self._table(reduce, True)

    @torch.no_grad()
    def influences(self) -> dict[str, tuple[Tensor, ...]]:
        """Return {metric: (scores [P], influences [P, N])}, float64 on the CPU: see jackknife.py.

        This takes much memory for many probes. For a PlainMetric the influences are those of groups of images.
        """
        return self._table(lambda score, left_out, _: (score, _influences(score, left_out)), True)

    def by_class(self) -> dict[str, Tensor]:
        """Return {metric: scores of every class, float64 [P, C] on the CPU} for the metrics that score classes.

        Classes without a score have NaN.
        """
        if self._by_class is None:
            self.scores()
        return self._by_class or {}

    def calibration(self) -> Tensor:
        """Return float64 [P, BINS, 3] on the CPU: for each bin of the confidence the number of pairs, and the sums of
        their confidences and outcomes. Ask for it after the scores or estimates of all metrics, which fill the bins.
        """
        assert self._shared is not None, "no metric counts the bins"
        return self._shared.bins.cpu().masked_fill(~self.finite.cpu().view(-1, 1, 1), 0)

    def _table(self, reduce: Reduce, leave_out: bool) -> dict[str, tuple[Tensor, ...]]:
        """Return {metric: reduce(scores, left_out, counts)} of all probes.

        left_out, the scores without each image [p, N], is None without leave_out. It is reduced for a slice of the
        probes at a time, so that [P, N] never exists.
        """
        parts: dict[str, list[tuple[Tensor, ...]]] = {}
        by_class: dict[str, list[tuple[Tensor, ...]]] = {}
        for metric, estimate in self._estimates(leave_out):
            scores, counts = estimate.scores, estimate.counts
            counts = torch.full_like(scores, self._informative) if counts is None else counts
            columns = reduce(scores, estimate.left_out, counts.clamp(max=self._informative))
            parts.setdefault(metric.type, []).append(columns)
            if estimate.by_class is not None:
                by_class.setdefault(metric.type, []).append((estimate.by_class,))
        self._by_class = {name: columns[0] for name, columns in self._joined(by_class).items()}
        return self._joined(parts)

    def _joined(self, parts: dict[str, list[tuple[Tensor, ...]]]) -> dict[str, tuple[Tensor, ...]]:
        """Join the columns of all slices of probes, on the CPU, with NaN for probes that are not finite."""
        table = {m: tuple(torch.cat(column).cpu() for column in zip(*rows, strict=True)) for m, rows in parts.items()}
        broken = ~self.finite.cpu()
        for columns in table.values():
            for column in columns:
                column[broken] = torch.nan
        return table

    def _estimates(self, leave_out: bool) -> Iterator[tuple[Metric, Estimate]]:
        """Yield (metric, its estimate) for one slice of the probes after another."""
        for (gatherer, kind), metrics in self._readers.items():
            for probes in self._batches(gatherer.width(kind) * len(self.labels)):
                evidence = gatherer.read(kind, probes)
                for metric in metrics:
                    yield metric, metric.estimate(evidence, leave_out)

    def _batches(self, numbers: int) -> Iterator[slice]:
        """Yield slices of the probes, none with both softmax and sigmoids. numbers: that are processed for a probe."""
        size = max(gatherers.AT_ONCE[self.labels.device.type] // numbers, 1)
        starts = [p for p, kind in enumerate(self.softmax) if p == 0 or kind != self.softmax[p - 1]]
        for first, end in itertools.pairwise([*starts, len(self.softmax)]):
            yield from (slice(start, min(start + size, end)) for start in range(first, end, size))


def _influences(scores: Tensor, left_out: Tensor | None) -> Tensor:
    assert left_out is not None, "an estimate lacks the scores without each image"
    return influences(scores, left_out)
