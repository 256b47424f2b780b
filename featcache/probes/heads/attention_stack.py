"""What stacks of heads that attend to positions share: a linear layer on what was gathered, trained by autograd."""

import torch
from torch import Tensor

from featcache.probes.heads.head import Gradient, Head


class AttentionStack:
    """P heads of one shape that see the same features [B, D] or maps [B, D, S]. See Stack."""

    def __init__(self, head: Head, bias: bool, weights: dict[str, Tensor]):
        self.head, self.bias, self.weights = head, bias, weights
        self.parameters = list(self.weights.values())

    def attend(self, maps: Tensor) -> Tensor:
        """Gather what the linear layer reads from maps [B, D, S]: [P, B, W]."""
        raise NotImplementedError

    def forward(self, features: Tensor, training: bool = False) -> Tensor:
        """Map features to logits [B, P, C]; with training, on an autograd graph."""
        maps = features.unsqueeze(2) if features.ndim == 2 else features
        with torch.set_grad_enabled(training):
            for parameter in self.parameters:
                parameter.requires_grad_(training)
            logits = self.attend(maps) @ self.weights["fc0.weight"].transpose(1, 2)
            if self.bias:
                logits = logits + self.weights["fc0.bias"].unsqueeze(1)
            return (logits / self.head.temperature + self.head.shift).transpose(0, 1)

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the parameters' gradients."""
        return list(torch.autograd.grad(logits, self.parameters, gradient))
