"""Attentive pooling: learned queries attend to the positions of a map, or the tokens, and a linear layer follows.

It is only the cross-attention of the attentive probes of CAE (Chen et al., IJCV 2024) and V-JEPA (Bardes et al., TMLR
2024): torch's nn.MultiheadAttention with learned queries, without their norms and V-JEPA's MLP.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.errors import BadInput
from featcache.feature import Feature, beside
from featcache.probes.heads.attention_stack import AttentionStack
from featcache.probes.heads.head import Head
from featcache.probes.heads.layered import drawn_layer, plain_convolution, taken


class Attentive(Head):
    """Learned queries attend to the positions with `heads` attention heads, and one linear layer follows."""

    type: Literal["attentive"] = "attentive"
    heads: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="attention heads; they must divide the width of the feature"
    )
    bias: bool = Field(True, description="whether the linear layer has a bias")
    queries: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="learned queries; the linear layer reads the answers to all of them side by side"
    )

    precisions: ClassVar[tuple[str, ...]] = ("float32", "tf32")
    reads_tokens: ClassVar[bool] = True

    @property
    def narrowest(self) -> int:
        """See Head.narrowest: every attention head takes at least one number."""
        return self.heads

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the weights of a torch.nn.MultiheadAttention, `attention.{query,key,value,out}.weight` and `.bias`; its
        learned queries `attention.token` [D], or [Q, D] for several, from N(0, 0.02^2); and the linear layer's weights.

        As in torch, the Xavier bound of queries, keys and values is that of the three matrices put together.
        """
        if dim % self.heads:
            raise BadInput(f"head attentive: {self.heads} heads do not divide features of width {dim}")
        shared = math.sqrt(6 / (4 * dim))
        bounds = {"query": shared, "key": shared, "value": shared, "out": 1 / math.sqrt(dim)}
        shape = (dim,) if self.queries == 1 else (self.queries, dim)
        weights = {"attention.token": torch.empty(shape).normal_(0, 0.02, generator=generator)}
        for name, bound in bounds.items():
            weights[f"attention.{name}.weight"] = torch.empty(dim, dim).uniform_(-bound, bound, generator=generator)
            # A bias of the keys shifts all scores of a query alike, which the softmax cancels.
            if name != "key":
                weights[f"attention.{name}.bias"] = torch.zeros(dim)
        return weights | drawn_layer("fc0", self.queries * dim, classes, self.bias, generator)

    def stack(self, weights: dict[str, Tensor], precision: str) -> "AttentiveStack":
        """See Head.stack."""
        return AttentiveStack(self, weights)

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """See Head.modules."""
        pooling = AttentivePooling(self.heads, taken(weights, "attention"))
        return {"attention": pooling, "fc0": plain_convolution(taken(weights, "fc0"))}

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """See Head.footprint."""
        return 4 * dim * dim, self.queries * self.heads * (positions + dim)

    def flops(self, dim: int, classes: int, positions: int) -> int:
        """Return three times the forward pass: for each query 4 D h S + 4 D D in the attention and 2 D C in the layer."""
        return 3 * self.queries * (4 * dim * (self.heads * positions + dim) + 2 * dim * classes)

    def misfit(
        self, features: Sequence[Feature], width: int, positions: int, batch_size: int
    ) -> tuple[str, str] | None:
        """See Head.misfit: every attention head takes an equal share of the feature."""
        if width % self.heads:
            return "head", f"{self.heads} attention heads do not divide {beside(features)}, which is {width} wide"
        return None


class AttentiveStack(AttentionStack):
    """P attentive heads of one shape.

    With few queries the cheap order of products is another one: each query goes back through the keys' weights, and the
    values' weights act on the weighted mean of the positions, so that no position needs its keys and values.
    """

    def __init__(self, head: Attentive, weights: dict[str, Tensor]):
        super().__init__(head, head.bias, weights)
        self.attentive = head

    def attend(self, maps: Tensor) -> Tensor:
        """Return the answers to the queries side by side, [P, B, Q D]."""
        w = {name.removeprefix("attention."): w for name, w in self.weights.items() if name.startswith("attention.")}
        (batch, dim, _), probes, heads, queries = (
            maps.shape,
            len(w["token"]),
            self.attentive.heads,
            self.attentive.queries,
        )
        token = w["token"].view(probes, queries, dim)
        query = token @ w["query.weight"].transpose(1, 2) + w["query.bias"].unsqueeze(1)  # [P, Q, D]
        by_head = (probes, heads, dim // heads, dim)
        seeking = torch.einsum("pqhe,phed->pqhd", query.unflatten(2, (heads, -1)), w["key.weight"].view(by_head))
        scores = (seeking.reshape(-1, dim) / math.sqrt(dim // heads)) @ maps  # [B, P Q heads, S]
        means = scores.softmax(2) @ maps.transpose(1, 2)  # [B, P Q heads, D]
        means = means.view(batch, probes, queries, heads, dim)
        values = torch.einsum("bpqhd,phed->pbqhe", means, w["value.weight"].view(by_head)).flatten(3)
        # The attention over positions sums to 1.
        values = (values + w["value.bias"].view(probes, 1, 1, dim)).flatten(1, 2)  # [P, B Q, D]
        answers = values @ w["out.weight"].transpose(1, 2) + w["out.bias"].unsqueeze(1)
        return answers.view(probes, batch, queries * dim)


class AttentivePooling(nn.Module):
    """The pooling of one trained head: maps [B, D, ...] to [B, Q D, 1, 1]. weights: named without their `attention.`."""

    def __init__(self, heads: int, weights: dict[str, Tensor]):
        super().__init__()
        w, dim = weights, weights["token"].shape[-1]
        self.token = nn.Parameter(w["token"].clone())
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        biases = [w["query.bias"], torch.zeros(dim), w["value.bias"]]
        self.attention.load_state_dict({
            "in_proj_weight": torch.cat([w["query.weight"], w["key.weight"], w["value.weight"]]),
            "in_proj_bias": torch.cat(biases),
            "out_proj.weight": w["out.weight"],
            "out_proj.bias": w["out.bias"],
        })  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        """Return what the queries attend to side by side, as a map with one position."""
        tokens = maps.flatten(2).transpose(1, 2)
        # torch.export would take len(maps) for a constant.
        query = self.token.view(-1, maps.shape[1]).expand(maps.shape[0], -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0].flatten(1)[:, :, None, None]
