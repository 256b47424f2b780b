"""The linear head: one layer."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.gemm import multiply
from featcache.probes.heads.head import Gradient, scaled, unscaled
from featcache.probes.heads.layered import LayeredHead, Layout, drawn_layer
from featcache.probes.part import AtLeast0

INIT_STD = Field(
    0.0, description="deviation of normal initial weights, with biases of 0; 0 draws both uniformly, as torch does"
)


class Linear(LayeredHead):
    """One linear layer, a 1x1 convolution on a map."""

    type: Literal["linear"] = "linear"
    bias: bool = Field(True, description="whether the layer has a bias")
    init_std: AtLeast0 = INIT_STD

    commutes: ClassVar[bool] = True

    @property
    def layout(self) -> Layout:
        """One layer."""
        return Layout(bias=self.bias)

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw from N(0, init_std^2), or as torch does."""
        return drawn_layer("fc0", dim, classes, self.bias, generator, self.init_std)

    def in_cache(self, rows: int) -> bool:
        """See Head.in_cache. A linear head reads its weights for every row."""
        return True

    def stack(self, weights: dict[str, Tensor], precision: str) -> "LinearStack":
        """See Head.stack."""
        return LinearStack(self, weights, precision)


class LinearStack:
    """P linear probes that see the same features: one GEMM forward, one backward. See Stack."""

    def __init__(self, head: Linear, weights: dict[str, Tensor], precision: str):
        self.head, self.precision, self.weights = head, precision, weights
        self.parameters = list(self.weights.values())

    def forward(self, features: Tensor, training: bool = False) -> Tensor:
        """Map features [B, D] to logits [B, P, C]. They lie as [P, C, B], the result of the faster GEMM."""
        weight = self.weights["fc0.weight"]  # [P, C, D]
        precision = self.precision if training else "float32"
        logits = multiply(weight.flatten(0, 1), features.t(), precision).unflatten(0, weight.shape[:2])
        if self.head.bias:
            logits += self.weights["fc0.bias"].unsqueeze(2)
        return scaled(logits, self.head).permute(2, 0, 1)

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the parameters' gradients; that of the weight is the pair (A, B) that stands for A B."""
        gradient = unscaled(gradient, self.head).permute(1, 2, 0)  # [P, C, B]
        weight = (gradient.flatten(0, 1), features)
        return [weight, gradient.sum(2)] if self.head.bias else [weight]
