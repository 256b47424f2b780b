"""A B-cos layer and uncentred batch norm as modules, for one head alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-5
PATCH_EPS = 1e-6


def cosine_power(cosine: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """Return |cos|^(b - 1), and |cos| times its derivative. As in the package, |cos| gets 1e-6 unless b is 2."""
    if b == 2:
        return cosine, cosine
    return (cosine + PATCH_EPS).pow(b - 1), (b - 1) * cosine * (cosine + PATCH_EPS).pow(b - 2)


def uncentred_scale(weight: Tensor, variance: Tensor) -> Tensor:
    """Return the factor of each channel in uncentred batch norm: weight / sqrt(variance + 1e-5)."""
    return weight / (variance + NORM_EPS).sqrt()


class BcosConv2d(nn.Module):
    """A 1x1 B-cos convolution: maps [B, D, h, w] to [B, U, h, w]. weight: [U * max_out, D, 1, 1]."""

    def __init__(self, inputs: int, outputs: int, b: float, max_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))
        self.b, self.max_out = b, max_out
        self.detach = False

    def set_explanation_mode(self, activate: bool) -> None:
        """Take the factor |cos|^(b - 1) for a constant in gradients, or not, as the bcos package's layers do."""
        self.detach = activate

    def forward(self, maps: Tensor) -> Tensor:
        """Return the scaled responses."""
        out = F.conv2d(maps, F.normalize(self.weight, dim=1))
        if self.max_out > 1:
            out = out.unflatten(1, (-1, self.max_out)).max(2).values
        if self.b == 1:
            return out
        cosine = out.abs() / (maps.square().sum(1, keepdim=True) + PATCH_EPS).sqrt()
        factor = cosine_power(cosine, self.b)[0]
        return (factor.detach() if self.detach else factor) * out


class BatchNormUncentered2d(nn.Module):
    """The bcos package's norm of that name without bias, in eval mode: a fixed factor per channel."""

    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Scale maps [B, D, h, w]; the mean is not subtracted."""
        return maps * uncentred_scale(self.weight, self.running_var)[:, None, None]
