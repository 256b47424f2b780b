"""Efficient probing (Psomas et al., ICLR 2026): queries attend to the positions themselves, each for a slice of the values."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.feature import Feature, beside
from featcache.probes.heads.attention_stack import AttentionStack
from featcache.probes.heads.head import Head
from featcache.probes.heads.layered import drawn_layer, plain_convolution, taken


class Efficient(Head):
    """Learned queries attend to the positions, each for a slice of the values, and one linear layer follows.

    The positions are their own keys. Query q gives the weights softmax(q x / sqrt(D)), by which the slice of the values
    W_v x that belongs to the query is averaged; the slices side by side are what the linear layer reads.
    """

    type: Literal["efficient"] = "efficient"
    queries: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="learned queries; they must divide the width of the values"
    )
    shrink: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="by what the values are narrower than the feature"
    )
    bias: bool = Field(True, description="whether the linear layer has a bias")

    precisions: ClassVar[tuple[str, ...]] = ("float32", "tf32")
    reads_tokens: ClassVar[bool] = True

    @property
    def narrowest(self) -> int:
        """See Head.narrowest: every query has a slice of at least one number."""
        return self.queries * self.shrink

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the queries `attention.token` [Q, D] from N(0, 0.02^2), and `attention.value.weight` [D / shrink, D] and
        the linear layer as torch draws linear layers.
        """
        width = dim // self.shrink
        token = torch.empty(self.queries, dim).normal_(0, 0.02, generator=generator)
        values = drawn_layer("attention.value", dim, width, False, generator)
        return {"attention.token": token} | values | drawn_layer("fc0", width, classes, self.bias, generator)

    def stack(self, weights: dict[str, Tensor], precision: str) -> "EfficientStack":
        """See Head.stack."""
        return EfficientStack(self, weights)

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """See Head.modules."""
        return {
            "attention": EfficientPooling(taken(weights, "attention")),
            "fc0": plain_convolution(taken(weights, "fc0")),
        }

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """See Head.footprint."""
        return dim * (dim // self.shrink + self.queries), self.queries * (positions + dim)

    def flops(self, dim: int, classes: int, positions: int) -> int:
        """Return three times the forward pass: 4 D Q S for the attention, 2 D D / shrink and 2 D C / shrink for the rest."""
        return 3 * (4 * dim * self.queries * positions + 2 * dim // self.shrink * (dim + classes))

    def misfit(
        self, features: Sequence[Feature], width: int, positions: int, batch_size: int
    ) -> tuple[str, str] | None:
        """See Head.misfit: every query takes an equal slice of the values."""
        if width % (self.queries * self.shrink):
            slices = f"{self.queries} queries" + (f" and shrink {self.shrink}" if self.shrink > 1 else "")
            return "head", f"{slices} do not divide {beside(features)}, which is {width} wide"
        return None


class EfficientStack(AttentionStack):
    """P heads of one shape.

    The values' weights act on the weighted means of the positions, so that no position needs its values.
    """

    def __init__(self, head: Efficient, weights: dict[str, Tensor]):
        super().__init__(head, head.bias, weights)

    def attend(self, maps: Tensor) -> Tensor:
        """See AttentionStack.attend. The slices of the queries are side by side, [P, B, D / shrink]."""
        token, value = self.weights["attention.token"], self.weights["attention.value.weight"]
        probes, queries, dim = token.shape
        scores = (token.flatten(0, 1) / math.sqrt(dim)) @ maps  # [B, P Q, S]
        means = (scores.softmax(2) @ maps.transpose(1, 2)).view(-1, probes, queries, dim)
        slices = value.view(probes, queries, -1, dim)
        return torch.einsum("bpqd,pqed->pbqe", means, slices).flatten(2)


class EfficientPooling(nn.Module):
    """The pooling of one trained head: maps [B, D, ...] to [B, D / shrink, 1, 1].

    weights: named without their `attention.`.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.token = nn.Parameter(weights["token"].clone())
        self.value = nn.Parameter(weights["value.weight"].clone())

    def forward(self, maps: Tensor) -> Tensor:
        """Return the slices of all queries side by side, as a map with one position."""
        queries, dim = self.token.shape
        tokens = maps.flatten(2)  # [B, D, S]
        attention = (self.token @ tokens / math.sqrt(dim)).softmax(2)  # [B, Q, S]
        values = (self.value @ tokens).unflatten(1, (queries, -1))  # [B, Q, E, S]
        return (values * attention.unsqueeze(2)).sum(3).flatten(1)[:, :, None, None]
