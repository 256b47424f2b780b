"""The term that focal and asymmetric losses share."""

from torch import Tensor
from torch.nn import functional as F


def focused(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return -(1 - q)^gamma log(q) with q = sigmoid(logits), and its derivative by the logits."""
    log = F.softplus(-logits)
    other = (-logits).sigmoid_()  # 1 - q
    power = other.pow(gamma)
    return power * log, -power * (gamma * (1 - other) * log + other)
