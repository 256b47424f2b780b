"""B-cos layers (Böhle et al., CVPR 2022; TPAMI 2024) as 1x1 convolutions, and uncentred batch norm.

The stacks use the functions, the single head the modules.
"""

import torch
from torch import nn
from torch.nn import functional as F

NORM_EPS = 1e-5
PATCH_EPS = 1e-6


def unit(weight, dim):
    """Scale weights to unit norm over the inputs, which are axis `dim`."""
    return F.normalize(weight, dim=dim)


def largest(out, count, dim):
    """MaxOut: keep the largest of each unit's `count` responses, which lie side by side on axis `dim`."""
    return out.unflatten(dim, (-1, count)).max(dim + 1 if dim >= 0 else dim).values if count > 1 else out


def aligned(out, squares, b):
    """Scale responses s = w.x to s |cos|^(b - 1), with |cos| = |s| / sqrt(|x|^2 + 1e-6).

    squares: |x|^2, of a shape that broadcasts to out's. b: 1 leaves s as it is; for b other than 2,
    1e-6 is added to |cos|. These are the terms of the bcos package's BcosConv2d.
    """
    if b == 1:
        return out
    norm = (squares + PATCH_EPS).sqrt()
    if b == 2:
        return out.abs() / norm * out
    return ((out / norm).abs() + 1e-6).pow(b - 1) * out


def uncentred_scale(weight, variance):
    """What uncentred batch norm multiplies each channel by: weight / sqrt(variance + 1e-5)."""
    return weight / (variance + NORM_EPS).sqrt()


class BcosConv2d(nn.Module):
    """A 1x1 B-cos convolution: maps [B, D, h, w] to [B, U, h, w]. weight: [U * max_out, D, 1, 1]."""

    def __init__(self, inputs, outputs, b, max_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.b, self.max_out = b, max_out

    def forward(self, maps):
        """Return the scaled responses."""
        out = largest(F.conv2d(maps, unit(self.weight, 1)), self.max_out, 1)
        return aligned(out, maps.square().sum(1, keepdim=True), self.b)


class BatchNormUncentered2d(nn.Module):
    """The bcos package's norm of that name without bias, in eval mode: a fixed factor per channel."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, maps):
        """Scale maps [B, D, h, w]; the mean is not taken away."""
        return maps * uncentred_scale(self.weight, self.running_var)[:, None, None]
