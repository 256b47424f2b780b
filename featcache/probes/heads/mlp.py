"""The MLP head: layers with norms and activations between them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from featcache.probes.heads.layer_stack import LayerStack
from featcache.probes.heads.layered import LayeredHead, Layout
from featcache.probes.heads.norms import norm_layers
from featcache.probes.heads.stacked_layers import GELU, Layer, LinearLayer, Mean, ReLU
from featcache.probes.part import Count, CountOr0

ACTIVATIONS = {"relu": (ReLU, nn.ReLU), "gelu": (GELU, nn.GELU)}


class Mlp(LayeredHead):
    """Layers of width `hidden`, with a norm and an activation between them."""

    type: Literal["mlp"] = "mlp"
    layers: Annotated[int, Field(ge=2, le=8)] = Field(2, description="number of layers")
    hidden: Count = Field(2048, description="width of the layers between")
    activation: Literal["relu", "gelu"] = Field("relu", description="between layers; gelu is the exact form, with erf")
    norm: Literal["bn", "bnu", "none"] = Field(
        "bn", description="between layers: batch norm, uncentred batch norm, or none"
    )
    norm_batch: CountOr0 = Field(
        0, description="images over which the norm takes its statistics in training; 0 takes the whole mini-batch"
    )
    bias: bool = Field(True, description="whether layers that no `bn` follows have a bias")

    @model_validator(mode="before")
    @classmethod
    def _without_idle_fields(cls, data: Any) -> Any:
        return without_idle_norm_batch(data)

    @property
    def layout(self) -> Layout:
        """Its layers."""
        return Layout(self.layers, self.hidden, self.norm, self.norm_batch, self.bias)

    def positions_of(self, layer: int, positions: int) -> int:
        """See LayeredHead.positions_of. The last layer commutes with the mean over positions, and so sees only that."""
        return 1 if layer == self.layers - 1 else positions

    def stack(self, weights: dict[str, Tensor], precision: str) -> LayerStack:
        """See Head.stack. The mean over positions comes before the last layer, with which it commutes."""
        layers: list[Layer] = []
        for i in range(self.layers):
            if i == self.layers - 1:
                layers.append(Mean())
            layers.append(LinearLayer(weights[f"fc{i}.weight"], weights.get(f"fc{i}.bias")))
            if i < self.layers - 1:
                layers += [*norm_layers(self.layout, weights, i), ACTIVATIONS[self.activation][0]()]
        return LayerStack(self, weights, precision, layers)

    def between(self, layer: int) -> dict[str, nn.Module]:
        """See LayeredHead.between."""
        return {f"{self.activation}{layer}": ACTIVATIONS[self.activation][1]()}


def without_idle_norm_batch(data: Any) -> Any:
    """Drop norm_batch from the fields of a head without norm, where it changes nothing."""
    if isinstance(data, dict) and data.get("norm") == "none":
        return {name: value for name, value in data.items() if name != "norm_batch"}
    return data
