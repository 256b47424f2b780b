"""The linear head: one layer."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.probes.gemm import multiply
from featcache.probes.heads.head import Gradient, scaled, unscaled
from featcache.probes.heads.layered import LayeredHead, Layout, drawn_layer
from featcache.probes.part import AtLeast0, Whole

INIT_STD = Field(
    0.0, description="deviation of normal initial weights, with biases of 0; 0 draws both uniformly, as torch does"
)
# Is added to the norm of a feature, as in VISSL.
LEAST_NORM = 1e-5


def l2_normalised(features: Tensor, dim: int) -> Tensor:
    """Divide features by their norm along an axis, and a little more: f / (|f| + 1e-5)."""
    # The squares of float16 numbers may be beyond its range.
    features = features if features.dtype == torch.float64 else features.float()
    return features / (features.norm(dim=dim, keepdim=True) + LEAST_NORM)


class L2Norm(nn.Module):
    """Divides features [B, D, h, w] by their norm over the channels."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalised features."""
        return l2_normalised(maps, 1)


class Linear(LayeredHead):
    """One linear layer, a 1x1 convolution on a map."""

    type: Literal["linear"] = "linear"
    bias: bool = Field(True, description="whether the layer has a bias")
    init_std: AtLeast0 = INIT_STD
    norm: Literal["none", "l2"] = Field(
        "none", description="of the features, before the layer: none, or l2, f / (‖f‖ + 1e-5), which needs pool: before"
    )

    capturable: ClassVar[bool] = True

    @property
    def commutes(self) -> bool:
        """See Head.commutes."""
        return self.norm == "none"

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if self.norm != "none" and self.pool == "after":
            return f"head.norm {self.norm} is of the pooled features: say pool: before"
        return None

    def normalised(self, features: Tensor) -> Tensor:
        """Return features [n, D] as the layer reads them."""
        return features if self.norm == "none" else l2_normalised(features, 1)

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """See LayeredHead.modules: the norm comes first."""
        norm: dict[str, nn.Module] = {} if self.norm == "none" else {"norm": L2Norm()}
        return norm | super().modules(weights)

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
        features = self.head.normalised(features)
        precision = self.precision if training else "float32"
        logits = multiply(weight.flatten(0, 1), features.t(), precision).unflatten(0, weight.shape[:2])
        if self.head.bias:
            logits += self.weights["fc0.bias"].unsqueeze(2)
        return scaled(logits, self.head).permute(2, 0, 1)

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the parameters' gradients; that of the weight is the pair (A, B) that stands for A B."""
        gradient = unscaled(gradient, self.head).permute(1, 2, 0)  # [P, C, B]
        weight = (gradient.flatten(0, 1), self.head.normalised(features))
        return [weight, gradient.sum(2)] if self.head.bias else [weight]
