"""Heads that are layers of 1x1 convolutions, one after another: their weights, costs and modules."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.feature import Feature
from featcache.probes.heads.bcos_modules import BatchNormUncentered2d
from featcache.probes.heads.head import Head

# The tensors of a norm between layers, and their initial values.
NORMS: dict[str, dict[str, float]] = {
    "bn": {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0},
    "bnu": {"weight": 1.0, "running_var": 1.0},
    "none": {},
}
NORM_MODULES = {"bn": nn.BatchNorm2d, "bnu": BatchNormUncentered2d}


class Layout(NamedTuple):
    """The layers of a head: how many, the width between them, norm and bias, and responses of each unit."""

    layers: int = 1
    hidden: int = 0
    norm: str = "none"
    norm_batch: int = 0
    bias: bool = True
    max_out: int = 1

    def widths(self, dim: int, classes: int) -> list[int]:
        """Return how many inputs each layer has, and how many outputs the last one."""
        return [dim, *[self.hidden] * (self.layers - 1), classes]


class LayeredHead(Head):
    """Base of heads whose weights are `fc{i}.weight` [out, in] and `fc{i}.bias`; those of a norm are `bn{i}.weight`,
    `.bias`, `.running_mean` and `.running_var` (uncentred: `.weight` and `.running_var`).
    """

    pool: Literal["after", "before"] = Field(
        "after", description="what is averaged over positions: the logits (after) or the features (before)"
    )

    @property
    def averages_features(self) -> bool:
        """See Head.averages_features."""
        return self.pool == "before"

    @property
    def layout(self) -> Layout:
        """Its layers."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return self.layout.layers

    @classmethod
    def label_of(cls, fields: Mapping[str, Any]) -> str:
        """See Head.label_of: type, number of layers, and the width between them if there are several."""
        if "layers" not in cls.model_fields:
            return cls.word()
        width = f" ({fields['hidden']})" if int(fields["hidden"]) else ""
        return f"{cls.word()}-{fields['layers']}{width}"

    def first_width(self, classes: int) -> int:
        """See Head.first_width."""
        return self.layout.hidden or classes

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw from U(-1/sqrt(in), 1/sqrt(in)), as torch's Linear and Conv2d do."""
        layout, weights = self.layout, dict[str, Tensor]()
        widths = layout.widths(dim, classes)
        for i in range(layout.layers):
            # Batch norm cancels a bias before it, and Adam would move that bias about on rounding noise.
            biased = layout.bias and (layout.norm != "bn" or i == layout.layers - 1)
            weights |= drawn_layer(f"fc{i}", widths[i], widths[i + 1] * layout.max_out, biased, generator)
            if i < layout.layers - 1:
                norm = {n: torch.full((widths[i + 1],), value) for n, value in NORMS[layout.norm].items()}
                weights |= {f"bn{i}.{name}": tensor for name, tensor in norm.items()}
        return weights

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """Return how many weights the first layer has, and how many numbers it outputs for an image."""
        width = self.layout.hidden or classes
        return width * dim, width * positions

    def flops(self, dim: int, classes: int, positions: int) -> int:
        """Return 4 D C for a linear head (docs/performance.md).

        A layer of n inputs and m outputs costs 2 n m forward and 2 n m for the gradient of its weights, at every
        position; all but the first cost 2 n m more for the gradient of their input.
        """
        layout = self.layout
        widths, total = layout.widths(dim, classes), 0
        for i in range(layout.layers):
            cost = (4 if i == 0 else 6) * widths[i] * widths[i + 1] * layout.max_out
            total += cost * self.positions_of(i, positions)
        return total

    def positions_of(self, layer: int, positions: int) -> int:
        """Return at how many positions a layer is computed."""
        return positions

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Return the layers as 1x1 convolutions, norms and activations."""
        layers: dict[str, nn.Module] = {}
        layout = self.layout
        for i in range(layout.layers):
            layers[f"fc{i}"] = self.convolution(taken(weights, f"fc{i}"))
            if i < layout.layers - 1:
                if layout.norm != "none":
                    layers[f"bn{i}"] = _norm_module(layout, taken(weights, f"bn{i}"))
                layers |= self.between(i)
        return layers

    def convolution(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return a layer as a module. weights: {"weight": [out, in], and "bias" if it has one}."""
        return plain_convolution(weights)

    def between(self, layer: int) -> dict[str, nn.Module]:
        """Return the modules between the norm behind a layer and the next layer, by name."""
        return {}

    def misfit(
        self, features: Sequence[Feature], width: int, positions: int, batch_size: int
    ) -> tuple[str, str] | None:
        """See Head.misfit: a norm needs two rows to have a variance."""
        layout = self.layout
        if layout.norm != "none" and min(batch_size, layout.norm_batch or batch_size) * positions == 1:
            field = "head.norm_batch" if layout.norm_batch else "batch_size"
            return field, "one image has no variance for head.norm to divide by; take 2 or more"
        return None


def drawn_layer(
    name: str, inputs: int, outputs: int, bias: bool, generator: torch.Generator, std: float = 0.0
) -> dict[str, Tensor]:
    """Draw a linear layer's weight [out, in] and bias [out], as torch does: {name.weight: ..., name.bias: ...}.

    With a std the weight is normal with that deviation and the bias 0.
    """
    if std:
        weights = {f"{name}.weight": torch.empty(outputs, inputs).normal_(0, std, generator=generator)}
        return weights | ({f"{name}.bias": torch.zeros(outputs)} if bias else {})
    bound = 1 / math.sqrt(inputs)
    weights = {f"{name}.weight": torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)}
    if bias:
        weights[f"{name}.bias"] = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
    return weights


def taken(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the weights of one layer out of a dict, without the prefix of their names."""
    names = [name for name in weights if name.startswith(f"{prefix}.")]
    return {name.removeprefix(f"{prefix}."): weights.pop(name) for name in names}


def plain_convolution(weights: dict[str, Tensor]) -> nn.Module:
    """Return a linear layer as a 1x1 convolution. weights: {"weight": [out, in], and "bias" if it has one}."""
    outputs, inputs = weights["weight"].shape
    return filled_convolution(nn.Conv2d(inputs, outputs, 1, bias="bias" in weights), weights)


def filled_convolution(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load the weights of a layer, "weight" as [out, in], into a 1x1 convolution. Raises ValueError as filled() does."""
    return filled(module, weights | {"weight": weights["weight"][:, :, None, None]})


def filled(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load weights into a module. Raises ValueError unless they are exactly the module's."""
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the head: {error}") from None
    missing = [name for name in missing if name != "num_batches_tracked"]
    if missing or unexpected:
        raise ValueError(f"weights do not fit the head: missing {missing}, unexpected {unexpected}")
    return module


def _norm_module(layout: Layout, weights: dict[str, Tensor]) -> nn.Module:
    return filled(NORM_MODULES[layout.norm](len(weights["weight"])), weights)
