"""The B-cos head (Böhle et al., CVPR 2022; TPAMI 2024)."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from featcache.probes.gemm import multiply
from featcache.probes.heads.bcos_modules import PATCH_EPS, BcosConv2d, cosine_power
from featcache.probes.heads.layer_stack import LayerStack
from featcache.probes.heads.layered import LayeredHead, Layout, filled_convolution
from featcache.probes.heads.mlp import without_idle_norm_batch
from featcache.probes.heads.norms import norm_layers
from featcache.probes.heads.stacked_layers import Layer, Mean, weight_gradient
from featcache.probes.part import Count, CountOr0


class Bcos(LayeredHead):
    """B-cos layers without bias, with a norm between them; nothing else is non-linear."""

    type: Literal["bcos"] = "bcos"
    layers: Annotated[int, Field(ge=1, le=8)] = Field(1, description="number of layers")
    hidden: Count = Field(2048, description="width of the layers between")
    b: Annotated[float, Field(ge=1, le=16)] = Field(2.0, description="exponent of the layers; 1 makes them linear")
    max_out: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="responses of each unit, of which the largest is kept"
    )
    norm: Literal["bnu", "none"] = Field(
        "bnu", description="between layers: uncentred batch norm without bias, or none"
    )
    norm_batch: CountOr0 = Field(
        0, description="images over which the norm takes its statistics in training; 0 takes the whole mini-batch"
    )

    bias: ClassVar[bool] = False

    @model_validator(mode="wrap")
    @classmethod
    def _without_idle_fields(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Give fields that cannot matter one value: a head with one layer has nothing between layers."""
        data = without_idle_norm_batch(data)
        one_layer = isinstance(data, dict) and data.get("layers", 1) == 1
        if one_layer:
            data = {name: value for name, value in data.items() if name not in ("hidden", "norm", "norm_batch")}
        head = handler(data)
        if one_layer:
            head.__dict__ |= {"hidden": 0, "norm": "none", "norm_batch": 0}
        return head

    @property
    def layout(self) -> Layout:
        """Its layers."""
        return Layout(self.layers, self.hidden, self.norm, self.norm_batch, False, self.max_out)

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """See LayeredHead.footprint. It counts the wider of the layers, with all responses of each unit."""
        width = self.max_out * max(self.hidden, classes)
        return width * dim, width * positions

    def stack(self, weights: dict[str, Tensor], precision: str) -> LayerStack:
        """See Head.stack."""
        layers: list[Layer] = []
        for i in range(self.layers):
            layers.append(BcosLayer(weights[f"fc{i}.weight"], self.b, self.max_out))
            if i < self.layers - 1:
                layers += norm_layers(self.layout, weights, i)
        return LayerStack(self, weights, precision, [*layers, Mean()])

    def convolution(self, weights: dict[str, Tensor]) -> nn.Module:
        """See LayeredHead.convolution."""
        outputs, inputs = weights["weight"].shape
        return filled_convolution(BcosConv2d(inputs, outputs, self.b, self.max_out), weights)


class BcosLayer(Layer):
    """y = s |cos|^(b - 1) with s = w.x / |w| and |cos| = |s| / sqrt(|x|^2 + 1e-6), which is the package's BcosConv2d.

    weight: [P, U max_out, D]. The max_out responses s of a unit lie side by side, and only the largest is kept.
    """

    def __init__(self, weight: Tensor, b: float, max_out: int):
        self.weight, self.b, self.max_out = weight, b, max_out

    def forward(self, rows: Tensor, training: bool) -> Tensor:
        """Map [D, R] or [P, D, R] to [P, U, R]."""
        self.rows = rows
        self.length = self.weight.norm(dim=2, keepdim=True).clamp(min=1e-12)
        self.unit = torch.div(self.weight, self.length, out=self.tensor("unit", self.weight.shape, self.weight))
        self.out = self.products(self.unit, rows)
        if self.max_out > 1:
            self.out, self.chosen = self.out.unflatten(1, (-1, self.max_out)).max(2)
        if self.b == 1:
            return self.out
        squares = self.dot(rows, rows, -2).unsqueeze(-2)
        self.norm = squares.add_(PATCH_EPS).sqrt_()  # [1, R] or [P, 1, R]
        self.cosine = torch.abs(self.out, out=self.tensor("cosine", self.out.shape, rows)).div_(self.norm)
        return self.out.mul_(cosine_power(self.cosine, self.b)[0])

    def backward(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient [P, D, R] of the input, or None if the probes share it."""
        shared = self.rows.ndim == 2
        if gradient.ndim == 4:
            gradient = gradient.flatten(2)
        fall = None
        if self.b != 1:
            power, steep = cosine_power(self.cosine, self.b)
            if not shared:
                # The response falls with |x|: dy / d|x| = -y steep / power / |x|.
                weighed = gradient if self.b == 2 else gradient * (steep / power)
                fall = self.dot(self.out, weighed, 1).unsqueeze(1).div_(self.norm.square()).neg_()
            if self.b == 2:
                torch.addcmul(gradient.new_zeros(()), gradient, steep, value=2, out=gradient)
            else:
                gradient = gradient * (power + steep)
        if self.max_out > 1:
            every = gradient.new_zeros(*gradient.shape[:2], self.max_out, gradient.shape[2])
            gradient = every.scatter_(2, self.chosen.unsqueeze(2), gradient.unsqueeze(2)).flatten(1, 2)
        first, second = weight_gradient(gradient, self.rows)
        weight = multiply(first, second, self.precision).view(self.weight.shape)
        # The response does not change along w itself.
        along = self.dot(weight, self.unit, 2).unsqueeze(2)
        self.gradients = [weight.addcmul_(self.unit, along, value=-1).div_(self.length)]
        if shared:
            return None
        rows = self.input_gradient(self.unit, gradient)
        return rows if fall is None else rows.addcmul_(self.rows, fall)
