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
        Top1, Top5, BalancedAccuracy, NLL, ECE,
    ],
)  # fmt: skip
V = TypeVar("V", float, Tensor)


def metrics_of(task: str) -> tuple[str, ...]:
    """Return the names of the metrics of a task. The first is the one that probes are chosen by."""
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
