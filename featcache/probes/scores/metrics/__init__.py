"""The registry of metrics: our own, and those of installed packages (docs/scores.md, "A metric of your own").

No other file names a metric.
"""

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

from featcache.errors import BadInput, nearest
from featcache.kinds import Registry
from featcache.probes.scores.metric import Metric, Task
from featcache.probes.scores.metrics.balanced_accuracy import BalancedAccuracy
from featcache.probes.scores.metrics.ece import ECE
from featcache.probes.scores.metrics.interpolated_average_precision import (
    ElevenPointAveragePrecision,
    EnvelopeAveragePrecision,
)
from featcache.probes.scores.metrics.mean_average_precision import MeanAveragePrecision
from featcache.probes.scores.metrics.nll import NLL
from featcache.probes.scores.metrics.precision_recall import (
    MacroF1,
    MacroPrecision,
    MacroRecall,
    MicroF1,
    MicroPrecision,
    MicroRecall,
)
from featcache.probes.scores.metrics.top_k import Top1, Top5

# Probes are chosen by the first metric of their task, unless the grid names another.
METRICS: Registry[Metric] = Registry(
    Metric,
    "featcache.metrics",
    "metric",
    [
        MeanAveragePrecision, MacroPrecision, MacroRecall, MacroF1, MicroPrecision, MicroRecall, MicroF1,
        Top1, Top5, BalancedAccuracy, NLL, ECE, EnvelopeAveragePrecision, ElevenPointAveragePrecision,
    ],
)  # fmt: skip
V = TypeVar("V", float, Tensor)


def metrics_of(task: str, chosen: str | None = None) -> tuple[str, ...]:
    """Return the names of the metrics that probes of a task are scored with. The first is the one they are chosen by.

    chosen: the metric that a grid chooses by, which may be one that is computed on request alone.
    """
    return tuple(name for name in known_metrics(task) if name == chosen or not METRICS[name].on_request)


def known_metrics(task: str) -> tuple[str, ...]:
    """Return the names of all metrics of a task."""
    return tuple(name for name, metric in METRICS.items() if task in metric.tasks)


def default_metric(task: str) -> str:
    """Return the name of the metric that probes are chosen by, unless the grid names another."""
    return metrics_of(task)[0]


def task_of(metrics: Iterable[str]) -> Task:
    """Return the task that has these metrics, for example those of a run."""
    names = set(metrics)
    return "multi-label" if default_metric("multi-label") in names else "single-label"


def metric_kind(name: str) -> type[Metric]:
    """Return the class of a metric. Raises BadInput for a name that no installed package knows."""
    if name not in METRICS:
        raise BadInput(f"metric {name!r} is not known here{nearest(name, METRICS)}; install the package that brings it")
    return METRICS[name]


def gain(metric: str, value: V) -> V:
    """Return the score, negated if lower is better, so that scores of any metric can be compared."""
    return value if metric_kind(metric).higher_is_better else -value
