"""Attentive pooling: a learned query attends to the positions of a map, or the tokens, and a linear layer follows.

The cross-attention of the attentive probes of CAE (Chen et al., IJCV 2024) and V-JEPA (Bardes et al., TMLR 2024)
alone: torch's nn.MultiheadAttention with one learned query, without their norms and V-JEPA's MLP.
"""

import math

import torch
from torch import nn


class AttentiveStack:
    """P attentive heads of one shape that see the same features [B, D] or maps [B, D, S].

    With one query the products go the cheap way round: the query goes back through the keys' weights, and the
    values' weights act on the mean of the positions, so that no position has keys or values of its own.
    """

    def __init__(self, specs, weights):
        self.head = specs[0].head
        self.weights = weights
        self.parameters = list(self.weights.values())

    def forward(self, features, training=False):
        """Map features to logits [B, P, C]; with training, on an autograd graph."""
        maps = features.unsqueeze(2) if features.ndim == 2 else features
        with torch.set_grad_enabled(training):
            for parameter in self.parameters:
                parameter.requires_grad_(training)
            pooled = self._attend(maps)  # [P, B, D]
            logits = pooled @ self.weights["fc0.weight"].transpose(1, 2)
            if self.head.bias:
                logits = logits + self.weights["fc0.bias"].unsqueeze(1)
            return (logits / self.head.temperature + self.head.offset).transpose(0, 1)

    def _attend(self, maps):
        held = {name.removeprefix("attention."): w for name, w in self.weights.items() if name.startswith("attention.")}
        probes, heads, (batch, dim, _) = len(held["token"]), self.head.heads, maps.shape
        query = torch.einsum("pod,pd->po", held["query.weight"], held["token"]) + held["query.bias"]
        by_head = (probes, heads, dim // heads)
        seeking = torch.einsum("phe,phed->phd", query.view(by_head), held["key.weight"].view(*by_head, dim))
        scores = (seeking.reshape(-1, dim) / math.sqrt(dim // heads)) @ maps  # [B, P heads, S]
        means = scores.softmax(2) @ maps.transpose(1, 2)  # [B, P heads, D]
        means = means.view(batch, probes, heads, dim)
        values = torch.einsum("bphd,phed->pbhe", means, held["value.weight"].view(*by_head, dim)).flatten(2)
        values = values + held["value.bias"].unsqueeze(1)  # The shares of attention sum to 1.
        return values @ held["out.weight"].transpose(1, 2) + held["out.bias"].unsqueeze(1)

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients."""
        return list(torch.autograd.grad(logits, self.parameters, gradient))


class AttentivePooling(nn.Module):
    """The pooling of one trained head: maps [B, D, ...] to [B, D, 1, 1]. weights: those named `attention.`."""

    def __init__(self, heads, weights):
        super().__init__()
        w = {name.removeprefix("attention."): value for name, value in weights.items()}
        dim = len(w["token"])
        self.token = nn.Parameter(w["token"].clone())
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        biases = [w["query.bias"], torch.zeros(dim), w["value.bias"]]
        self.attention.load_state_dict({
            "in_proj_weight": torch.cat([w["query.weight"], w["key.weight"], w["value.weight"]]),
            "in_proj_bias": torch.cat(biases),
            "out_proj.weight": w["out.weight"],
            "out_proj.bias": w["out.bias"],
        })  # fmt: skip

    def forward(self, maps):
        """Return the query's answer to the positions, as a map of one."""
        tokens = maps.flatten(2).transpose(1, 2)
        # Not len(maps), which torch.export would take for a constant.
        query = self.token.expand(maps.shape[0], 1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0].transpose(1, 2).unsqueeze(3)
