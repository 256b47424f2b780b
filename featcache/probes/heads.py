"""Heads: many of one shape side by side for training, and one alone as an ordinary module.

Weights of a probe go by the names `fc{i}.weight` [out, in], `fc{i}.bias`, and for batch norm
`bn{i}.weight`, `.bias`, `.running_mean`, `.running_var`; 1x1 convolutions in all but shape.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def initial_weights(spec, dim, classes):
    """Draw a probe's weights from its own seed: U(-1/sqrt(in), 1/sqrt(in)), as torch's Linear and Conv2d.

    Returns {name: float32 tensor}. Drawn probe by probe, so that they do not depend on neighbours.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    head = spec.head
    widths = [dim, *[head.hidden] * (head.layers - 1), classes]
    weights = {}
    for i in range(head.layers):
        bound = 1 / math.sqrt(widths[i])
        weights[f"fc{i}.weight"] = torch.empty(widths[i + 1], widths[i]).uniform_(-bound, bound, generator=generator)
        # Batch norm takes away what such a bias adds, and Adam would drive it about on rounding noise.
        if head.bias and (head.norm != "bn" or i == head.layers - 1):
            weights[f"fc{i}.bias"] = torch.empty(widths[i + 1]).uniform_(-bound, bound, generator=generator)
        if head.norm == "bn" and i < head.layers - 1:
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                weights[f"bn{i}.{name}"] = torch.full((widths[i + 1],), value)
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
            rows = maps.transpose(1, 2).reshape(batch * positions, dim)
            weight = self.weights["fc0.weight"]  # [P, H, D]
            probes = len(weight)
            bias = self.weights.get("fc0.bias")
            hidden = F.linear(rows, weight.flatten(0, 1), None if bias is None else bias.flatten())  # [B * S, P * H]
            for i in range(1, self.head.layers):
                hidden = F.relu(self._norm(hidden, i - 1, training))
                hidden = hidden.unflatten(1, (probes, -1)).transpose(0, 1)  # [P, B * S, H]
                if i == self.head.layers - 1:
                    hidden = hidden.unflatten(1, (batch, positions)).mean(2)  # [P, B, H]
                hidden = hidden @ self.weights[f"fc{i}.weight"].transpose(1, 2)
                if f"fc{i}.bias" in self.weights:
                    hidden = hidden + self.weights[f"fc{i}.bias"].unsqueeze(1)
                hidden = hidden.transpose(0, 1)  # [rows, P, units]
                if i < self.head.layers - 1:
                    hidden = hidden.flatten(1)
            return hidden

    def _norm(self, hidden, i, training):
        if self.head.norm == "none":
            return hidden
        weight, bias, mean, var = (
            self.weights[f"bn{i}.{n}"].flatten() for n in ("weight", "bias", "running_mean", "running_var")
        )
        # flatten() of a contiguous [P, H] is a view, so the running statistics move in place.
        return F.batch_norm(hidden, mean, var, weight, bias, training=training)

    def backward(self, features, logits, gradient):
        """Return the parameters' gradients."""
        return list(torch.autograd.grad(logits, self.parameters, gradient))


STACKS = {"linear": LinearStack, "mlp": MLPStack}


class Head(nn.Module):
    """One trained head as an ordinary module: maps [B, D, h, w] to logits [B, C].

    Built from a probe's spec and its weights; the logits are averaged over positions (or the
    features, if the spec says pool: before), without which GradCAM and the like have no map.
    """

    def __init__(self, spec, weights):
        super().__init__()
        layers = []
        for i in range(spec.head.layers):
            weight = weights[f"fc{i}.weight"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=f"fc{i}.bias" in weights)
            layers.append((f"fc{i}", conv))
            if i < spec.head.layers - 1:
                if spec.head.norm == "bn":
                    layers.append((f"bn{i}", nn.BatchNorm2d(weight.shape[0])))
                layers.append((f"relu{i}", nn.ReLU()))
        self.pool = spec.head.pool
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
        return maps.mean((2, 3))
