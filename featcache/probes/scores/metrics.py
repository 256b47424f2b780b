"""The metrics of a task by name, their direction, and what chance scores. How they are computed: tally.py."""

import torch

# The first of a task is the one that probes are chosen by, unless the grid names another.
TASK_METRICS = {
    "multi-label": (
        "map", "precision_macro", "recall_macro", "f1_macro", "precision_micro", "recall_micro", "f1_micro",
        "nll", "ece",
    ),
    "single-label": ("top1", "top5", "balanced_accuracy", "nll", "ece"),
}  # fmt: skip
METRICS = tuple(dict.fromkeys(metric for metrics in TASK_METRICS.values() for metric in metrics))
LOWER_IS_BETTER = ("nll", "ece")
# The others lie between 0 and 1.
UNBOUNDED = ("nll",)


def gain(metric, value):
    """Turn a score into one that is the better the higher it is, for comparing."""
    return -value if metric in LOWER_IS_BETTER else value


def chance(metric, labels, classes):
    """Expected score of a random ranking, or None where a ranking alone does not decide the score.

    labels: int8 [N, C] or int64 [N]. top-k: k / C. balanced_accuracy: 1 / C. map: the mean over classes of
    (H + (n - H) (R - 1) / (n - 1)) / n with n images, R of them positive, and H the n-th harmonic number
    (Bestgen 2015, "Exact expected average precision of the random baseline"); on few images that is
    well above the share of positives R / n.
    """
    if metric in ("top1", "top5", "balanced_accuracy"):
        return min((5 if metric == "top5" else 1) / classes, 1.0)
    if metric != "map":
        return None
    expected = []
    harmonics = (1 / torch.arange(1, len(labels) + 1, dtype=torch.float64)).cumsum(0).tolist()
    for n, positives in zip((labels >= 0).sum(0).tolist(), (labels == 1).sum(0).tolist(), strict=True):
        if positives:
            harmonic = harmonics[n - 1]
            expected.append((harmonic + (n - harmonic) * (positives - 1) / max(n - 1, 1)) / n)
    return sum(expected) / len(expected) if expected else None
