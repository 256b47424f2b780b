"""Heads: many of one shape side by side for training, and one alone as an ordinary module.

Weights of a probe go by the names `fc{i}.weight` [out, in], `fc{i}.bias`, and for batch norm
`bn{i}.weight`, `.bias`, `.running_mean`, `.running_var` (uncentred: `.weight`, `.running_var`);
1x1 convolutions in all but shape.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from featcache.probes.bcos import BatchNormUncentered2d, BcosConv2d, aligned, largest, uncentred_scale, unit

# What a norm between layers holds, and the values that it begins with.
NORMS = {
    "bn": {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0},
    "bnu": {"weight": 1.0, "running_var": 1.0},
    "none": {},
}


def widest(head, classes):
    """Outputs, over all its layers, of a head's widest layer that runs at every position."""
    if head.type == "bcos":
        return head.max_out * max(head.hidden, classes)
    return head.hidden or classes


def initial_weights(spec, dim, classes):
    """Draw a probe's weights from its own seed: U(-1/sqrt(in), 1/sqrt(in)), as torch's Linear and Conv2d.

    Returns {name: float32 tensor}. Drawn probe by probe, so that they do not depend on neighbours.
    """
    # Of an imported probe the weights are given, and only their names and shapes are asked for.
    generator = torch.Generator().manual_seed(spec.seed or 0)
    head = spec.head
    widths = [dim, *[head.hidden] * (head.layers - 1), classes]
    weights = {}
    for i in range(head.layers):
        bound = 1 / math.sqrt(widths[i])
        outputs = widths[i + 1] * head.max_out
        weights[f"fc{i}.weight"] = torch.empty(outputs, widths[i]).uniform_(-bound, bound, generator=generator)
        # Batch norm takes away what such a bias adds, and Adam would drive it about on rounding noise.
        if head.bias and (head.norm != "bn" or i == head.layers - 1):
            weights[f"fc{i}.bias"] = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
        if i < head.layers - 1:
            weights |= {f"bn{i}.{n}": torch.full((widths[i + 1],), v) for n, v in NORMS[head.norm].items()}
    return weights


class LinearStack:
    """P linear probes that see the same features: one GEMM forward, one backward.

    `weights`: {name: [P, ...]}; `parameters`: those of them that are trained, in order.
    """

    def __init__(self, specs, dim, classes, device):
        drawn = [initial_weights(spec, dim, classes) for spec in specs]
        self.head = specs[0].head
        self.weights = {name: torch.stack([w[name] for w in drawn]).to(device) for name in drawn[0]}
        self.parameters = list(self.weights.values())

    def forward(self, features, training=False):
        """Map features [B, D] to logits [B, P, C], in memory as [P, C, B]: weights first is the faster GEMM."""
        weight = self.weights["fc0.weight"]  # [P, C, D]
        logits = (weight.flatten(0, 1) @ features.t()).unflatten(0, weight.shape[:2])
        if self.head.bias:
            logits += self.weights["fc0.bias"].unsqueeze(2)
        if self.head.offset:
            logits += self.head.offset
        return logits.permute(2, 0, 1)

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients; the weight's as the pair (A, B) that stands for A B."""
        gradient = gradient.permute(1, 2, 0)  # [P, C, B]
        weight = (gradient.flatten(0, 1), features)
        return [weight, gradient.sum(2)] if self.head.bias else [weight]


class MLPStack:
    """P MLPs of one shape that see the same features [B, D] or maps [B, D, S].

    The first layer is one GEMM for all probes; batch norm treats (probe, unit) as channels; the mean
    over positions is taken before the last layer, with which it commutes.
    """

    def __init__(self, specs, dim, classes, device):
        drawn = [initial_weights(spec, dim, classes) for spec in specs]
        self.head = specs[0].head
        self.weights = {name: torch.stack([w[name] for w in drawn]).to(device) for name in drawn[0]}
        self.parameters = [w.requires_grad_() for name, w in self.weights.items() if "running" not in name]

    def forward(self, features, training=False):
        """Map features to logits [B, P, C]; with training, on an autograd graph and batch statistics."""
        with torch.set_grad_enabled(training):
            maps = features.unsqueeze(2) if features.ndim == 2 else features
            batch, dim, positions = maps.shape
            hidden = self._layer(maps.transpose(1, 2).reshape(batch * positions, dim), 0)  # [B * S, P, H]
            for i in range(1, self.head.layers):
                between = self._activation(self._norm(hidden.flatten(1), i - 1, training))
                between = between.view(hidden.shape).transpose(0, 1)  # [P, B * S, H]
                if i == self.head.layers - 1:
                    between, positions = self._before_last(between, batch, positions)
                hidden = self._layer(between, i)  # [rows, P, units]
            logits = hidden.unflatten(0, (batch, positions)).mean(1) if positions > 1 else hidden
            return logits + self.head.offset if self.head.offset else logits

    def _layer(self, rows, i):
        return _products(rows, self.weights[f"fc{i}.weight"], self.weights.get(f"fc{i}.bias"))

    def _activation(self, hidden):
        return F.relu(hidden)

    def _before_last(self, hidden, batch, positions):
        return hidden.unflatten(1, (batch, positions)).mean(2), 1

    def _norm(self, hidden, i, training):
        """Normalise hidden [rows, P * H], and in training move the running statistics in place."""
        # flatten() of a contiguous [P, H] is a view.
        held = {n: self.weights[f"bn{i}.{n}"].flatten() for n in NORMS[self.head.norm]}
        if self.head.norm == "bn":
            return F.batch_norm(
                hidden, held["running_mean"], held["running_var"], held["weight"], held["bias"], training=training
            )
        if self.head.norm == "bnu":
            variance = held["running_var"]
            if training:
                variance = hidden.var(0, unbiased=False)
                held["running_var"].lerp_(variance.detach(), 0.1)
            return hidden * uncentred_scale(held["weight"], variance)
        return hidden

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients."""
        return list(torch.autograd.grad(logits, self.parameters, gradient))


class BcosStack(MLPStack):
    """P B-cos heads of one shape: no bias, no activation, and every layer runs at every position."""

    def _layer(self, rows, i):
        out = largest(_products(rows, unit(self.weights[f"fc{i}.weight"], -1)), self.head.max_out, -1)
        squares = rows.square().sum(-1)  # [R] of the shared input, else [P, R]
        squares = squares.unsqueeze(1) if i == 0 else squares.t()
        return aligned(out, squares.unsqueeze(2), self.head.b)

    def _activation(self, hidden):
        return hidden

    def _before_last(self, hidden, batch, positions):
        return hidden, positions


def _products(rows, weight, bias=None):
    """Apply layers [P, U, D] to rows [R, D] that all probes share, or [P, R, D]: [R, P, U]."""
    if rows.ndim == 2:
        out = F.linear(rows, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return out.unflatten(1, weight.shape[:2])
    out = rows @ weight.transpose(1, 2)
    return (out if bias is None else out + bias.unsqueeze(1)).transpose(0, 1)


STACKS = {"linear": LinearStack, "mlp": MLPStack, "bcos": BcosStack}


class Head(nn.Module):
    """One trained head as an ordinary module: maps [B, D, h, w] to logits [B, C].

    Built from a probe's spec and its weights; the logits are averaged over positions (or the
    features, if the spec says pool: before), without which GradCAM and the like have no map.
    """

    def __init__(self, spec, weights):
        super().__init__()
        head, layers = spec.head, []
        for i in range(head.layers):
            outputs, inputs = weights[f"fc{i}.weight"].shape
            if head.type == "bcos":
                layers.append((f"fc{i}", BcosConv2d(inputs, outputs, head.b, head.max_out)))
            else:
                layers.append((f"fc{i}", nn.Conv2d(inputs, outputs, 1, bias=f"fc{i}.bias" in weights)))
            if i < head.layers - 1:
                if head.norm != "none":
                    norm = nn.BatchNorm2d if head.norm == "bn" else BatchNormUncentered2d
                    layers.append((f"bn{i}", norm(outputs // head.max_out)))
                if head.type == "mlp":
                    layers.append((f"relu{i}", nn.ReLU()))
        self.pool, self.offset = head.pool, head.offset
        self.layers = nn.ModuleDict(layers)
        state = {f"layers.{n}": w[:, :, None, None] if w.ndim == 2 else w for n, w in weights.items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        if unexpected or any("num_batches_tracked" not in key for key in missing):
            raise ValueError(f"weights do not fit the head: missing {missing}, unexpected {unexpected}")
        self.eval().requires_grad_(False)

    def forward(self, maps):
        """Map float32 [B, D, h, w] to logits [B, C]."""
        if self.pool == "before":
            maps = maps.mean((2, 3), keepdim=True)
        for layer in self.layers.values():
            maps = layer(maps)
        return maps.mean((2, 3)) + self.offset
