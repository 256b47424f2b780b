"""A batch norm, then one linear layer: the head of Goyal et al. (ICCV 2019), VISSL and MAE."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.feature import Feature
from featcache.probes.gemm import multiply
from featcache.probes.heads.head import Gradient, scaled, unscaled
from featcache.probes.heads.layered import LayeredHead, Layout, drawn_layer, filled, plain_convolution, taken
from featcache.probes.heads.linear import INIT_STD
from featcache.probes.heads.stacked_layers import NORM_MOMENTUM
from featcache.probes.part import AtLeast0, CountOr0, Positive


class BnLinear(LayeredHead):
    """Batch norm of the features, then one linear layer; a map is averaged over positions first."""

    type: Literal["bn_linear"] = "bn_linear"
    bias: bool = Field(True, description="whether the layer has a bias")
    init_std: AtLeast0 = INIT_STD
    affine: bool = Field(True, description="whether the norm has a weight and a bias")
    eps: Annotated[Positive, Field(le=1)] = Field(1e-5, description="is added to the norm's variances")
    cells: CountOr0 = Field(
        0,
        description="neighbouring numbers that share a mean and a variance; 0 is those of a channel of a grid(k,s,p), and "
        "1 otherwise",
    )

    @property
    def averages_features(self) -> bool:
        """See Head.averages_features."""
        return True

    @property
    def layout(self) -> Layout:
        """One layer."""
        return Layout(bias=self.bias)

    def in_cache(self, rows: int) -> bool:
        """See Head.in_cache. As a linear head it reads its weights for every row."""
        return True

    def resolved(self, classes: int, cells: int = 1) -> Self:
        """See Head.resolved."""
        return super().resolved(classes).model_copy(update={"cells": self.cells or cells})

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the layer as a linear head does. The norm is `bn.weight`, `.bias`, `.running_mean`, `.running_var`."""
        start = {"weight": 1.0, "bias": 0.0} if self.affine else {}
        start |= {"running_mean": 0.0, "running_var": 1.0}
        norm = {f"bn.{name}": torch.full((dim // (self.cells or 1),), value) for name, value in start.items()}
        return norm | drawn_layer("fc0", dim, classes, self.bias, generator, self.init_std)

    def stack(self, weights: dict[str, Tensor], precision: str) -> "BnLinearStack":
        """See Head.stack."""
        return BnLinearStack(self, weights, precision)

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """See Head.modules."""
        norm, cells = taken(weights, "bn"), self.cells or 1
        channels = len(norm["running_mean"])
        if cells == 1:
            module: nn.Module = filled(nn.BatchNorm2d(channels, self.eps, NORM_MOMENTUM, self.affine), norm)
        else:
            inner = filled(nn.BatchNorm3d(channels, self.eps, NORM_MOMENTUM, self.affine), norm)
            module = nn.Sequential(nn.Unflatten(1, (channels, cells)), inner, nn.Flatten(1, 2))
        return {"bn": module, "fc0": plain_convolution(taken(weights, "fc0"))}

    def misfit(
        self, features: Sequence[Feature], width: int, positions: int, batch_size: int
    ) -> tuple[str, str] | None:
        """See Head.misfit: the norm needs channels, and two numbers to have a variance."""
        if len(features) > 1 and any(feature.kind == "grid" for feature in features) and not self.cells:
            return "head", "a norm over the channels of a grid needs the grid alone; or say cells: 1"
        if width % (self.cells or 1):
            return "head.cells", f"{self.cells} do not divide features that are {width} wide"
        if batch_size == 1:
            return "batch_size", "one image has no variance for the norm to divide by; take 2 or more"
        return None

    def folded(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (weight [C, D], bias [C]) of the linear layer that a trained head is, norm included."""
        stacked = {name: w.unsqueeze(0) for name, w in weights.items()}
        weight, shift = BnLinearStack(self, stacked, "float32").folded()
        return weight[0], shift[0]


class BnLinearStack:
    """P heads that see the same features [B, D]. See Stack.

    All of them normalise by the same statistics, so the features are normalised once. The norm's weight and bias are then
    a scale and a shift of the linear layer's inputs, and so are, in prediction, the running statistics: these go into
    the layer, and the product of features and weights is the only work that grows with B.
    """

    def __init__(self, head: BnLinear, weights: dict[str, Tensor], precision: str):
        self.head, self.precision, self.weights = head, precision, weights
        self.parameters = [w for name, w in weights.items() if "running" not in name]
        self.cells = head.cells or 1

    def forward(self, features: Tensor, training: bool = False) -> Tensor:
        """Map features [B, D] to logits [B, P, C]; in training by the statistics of the batch, which move the running
        ones. A single row has no variance, and goes by the running ones.
        """
        weight, precision = self.weights["fc0.weight"], self.precision if training else "float32"
        shift = self.weights.get("fc0.bias")
        self.rows = features
        self.by_batch = training and len(features) * self.cells > 1
        if self.by_batch:
            self.rows = self._normalised(features)
        if not self.by_batch or self.head.affine:
            weight, shift = self.folded()
        logits = multiply(weight.flatten(0, 1), self.rows.t(), precision).unflatten(0, weight.shape[:2])
        if shift is not None:
            logits += shift.unsqueeze(2)
        return scaled(logits, self.head).permute(2, 0, 1)

    def _normalised(self, features: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(variance + eps) by the statistics of the batch, and move the running ones."""
        rows = features.unflatten(1, (-1, self.cells))  # [B, channels, cells]
        mean, count = rows.mean((0, 2)), len(features) * self.cells
        centred = rows - mean.unsqueeze(1)
        variance = centred.square().mean((0, 2))
        for name, value in (("mean", mean), ("var", variance * (count / (count - 1)))):
            running = self.weights[f"bn.running_{name}"]
            running.lerp_(value.expand_as(running), NORM_MOMENTUM)
        return centred.mul_((variance + self.head.eps).rsqrt_().unsqueeze(1)).flatten(1)

    def _statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean and the inverse deviation [P, channels] by which forward() has yet to normalise, if any."""
        if self.by_batch:
            return None, None
        return self.weights["bn.running_mean"], (self.weights["bn.running_var"] + self.head.eps).rsqrt()

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what the norm does to self.rows, x to scale x + shift, both [P, D]."""
        mean, inverse = self._statistics()
        scale, shift = self.weights.get("bn.weight"), self.weights.get("bn.bias")
        if mean is not None and inverse is not None:
            scale = inverse if scale is None else inverse * scale
            shift = -mean * scale if shift is None else shift - mean * scale
        if scale is None or shift is None:
            raise RuntimeError("a norm without weight and bias does nothing to rows that are normalised")
        return scale.repeat_interleave(self.cells, 1), shift.repeat_interleave(self.cells, 1)

    by_batch = False

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the weight [P, C, D] and the bias [P, C] of the layer with scale and shift in it."""
        weight, bias = self.weights["fc0.weight"], self.weights.get("fc0.bias")
        scale, shift = self._scale_and_shift()
        moved = (weight @ shift.unsqueeze(2)).squeeze(2)
        return weight * scale.unsqueeze(1), moved if bias is None else moved + bias

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the parameters' gradients; that of the weight is a pair (A, B) that stands for A B, where it can be."""
        gradient = unscaled(gradient, self.head).permute(1, 2, 0)  # [P, C, B]
        total = gradient.sum(2)
        biases: list[Gradient] = [total] if self.head.bias else []
        if self.by_batch and not self.head.affine:
            return [(gradient.flatten(0, 1), self.rows), *biases]
        weight = self.weights["fc0.weight"]
        scale, shift = self._scale_and_shift()
        slope = multiply(gradient.flatten(0, 1), self.rows, self.precision).view(weight.shape)  # of the folded weight
        norms: list[Gradient] = []
        if self.head.affine:
            by_scale, by_shift = (
                of_all.unflatten(1, (-1, self.cells)).sum(2)
                for of_all in ((slope * weight).sum(1), (total.unsqueeze(1) @ weight).squeeze(1))
            )
            mean, inverse = self._statistics()
            if mean is not None and inverse is not None:
                by_scale = (by_scale - by_shift * mean) * inverse
            norms = [by_scale, by_shift]
        into = torch.addcmul(slope * scale.unsqueeze(1), total.unsqueeze(2), shift.unsqueeze(1))
        return [*norms, into, *biases]
