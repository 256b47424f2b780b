"""B-cos layers (Böhle et al., CVPR 2022; TPAMI 2024) as 1x1 convolutions, and uncentred batch norm as a module.

The stacks use the layer of layers.py's kind, the single head the modules.
"""

import torch
from torch import nn
from torch.nn import functional as F

from featcache.probes.gemm import multiply
from featcache.probes.heads.layers import Layer, uncentred_scale, weight_gradient

PATCH_EPS = 1e-6


def cosine_power(cosine, b):
    """|cos|^(b - 1), and |cos| times its derivative; for b other than 2, 1e-6 is added to |cos| as the package does."""
    if b == 2:
        return cosine, cosine
    return (cosine + PATCH_EPS).pow(b - 1), (b - 1) * cosine * (cosine + PATCH_EPS).pow(b - 2)


class Bcos(Layer):
    """y = s |cos|^(b - 1) with s = w.x / |w| and |cos| = |s| / sqrt(|x|^2 + 1e-6), which is the package's BcosConv2d.

    weight: [P, U max_out, D]. Of each unit's max_out responses s, which lie side by side, the largest is kept.
    """

    def __init__(self, weight, b, max_out):
        self.weight, self.b, self.max_out = weight, b, max_out

    def forward(self, rows, training):
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

    def backward(self, gradient):
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
        # Along w itself the response does not change.
        along = self.dot(weight, self.unit, 2).unsqueeze(2)
        self.gradients = [weight.addcmul_(self.unit, along, value=-1).div_(self.length)]
        if shared:
            return None
        rows = self.input_gradient(self.unit, gradient)
        return rows if fall is None else rows.addcmul_(self.rows, fall)


class BcosConv2d(nn.Module):
    """A 1x1 B-cos convolution: maps [B, D, h, w] to [B, U, h, w]. weight: [U * max_out, D, 1, 1]."""

    def __init__(self, inputs, outputs, b, max_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.b, self.max_out = b, max_out

    def forward(self, maps):
        """Return the scaled responses."""
        out = F.conv2d(maps, F.normalize(self.weight, dim=1))
        if self.max_out > 1:
            out = out.unflatten(1, (-1, self.max_out)).max(2).values
        if self.b == 1:
            return out
        cosine = out.abs() / (maps.square().sum(1, keepdim=True) + PATCH_EPS).sqrt()
        return cosine_power(cosine, self.b)[0] * out


class BatchNormUncentered2d(nn.Module):
    """The bcos package's norm of that name without bias, in eval mode: a fixed factor per channel."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, maps):
        """Scale maps [B, D, h, w]; the mean is not taken away."""
        return maps * uncentred_scale(self.weight, self.running_var)[:, None, None]
